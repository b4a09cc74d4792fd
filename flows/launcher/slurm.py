"""Ranks as a Slurm job: srun starts them, Slurm's signals reach them, a preempted job queues again by itself."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path

from flows.config.launcher import LauncherConfig
from flows.launcher.local import process_environment, rank_command
from flows.launcher.outcome import NotSubmitted, RankError, last_lines
from flows.launcher.rank import EXIT_PREEMPTED

SCRIPT = "job.sbatch"
JOB_ID = "job.id"
POLL_INTERVAL_S = 5.0
"""Slurm's controller is shared by everybody; its jobs stay known to it for MinJobAge, 300 s by default."""
WARNING_S = 120
"""SIGTERM comes this long before the time limit; Slurm may send it up to 60 s early."""
FIRST_PORT, PORTS = 20_000, 10_000
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "PREEMPTED", "COMPLETING")


def slurm_script(module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> str:
    """The job script that runs `python -m module argument` once per rank.

    Args:
        module: What each rank runs with `python -m`.
        argument: File that it is given.
        config: The launcher.
        log_dir: Of this launch, on the file system that all nodes share.
    """
    slurm = config.slurm
    directives = {
        "job-name": f"millrace-{log_dir.parent.name.removesuffix('.partial')}",
        "nodes": config.num_nodes,
        "ntasks-per-node": config.num_ranks,
        "cpus-per-task": config.threads_per_rank or None,
        "gpus-per-node": config.num_ranks * config.gpus_per_rank or None,
        "time": slurm.time_limit,
        "partition": slurm.partition or None,
        "account": slurm.account or None,
        "qos": slurm.qos or None,
        "chdir": os.getcwd(),
        "output": log_dir.absolute() / "slurm-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{WARNING_S}",
    }
    lines = [f"--{name}={value}" for name, value in directives.items() if value is not None]
    environment = {**process_environment(config), "OMP_NUM_THREADS": "${SLURM_CPUS_PER_TASK:-1}"}
    if config.threads_per_rank:
        environment["SRUN_CPUS_PER_TASK"] = "$SLURM_CPUS_PER_TASK"  # since 22.05 srun does not take it over by itself
    if path := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] = shlex.quote(path)
    exports = [f"export {name}={value}" for name, value in environment.items()]
    rank = shlex.join(rank_command(module, argument.absolute()))
    numbers = "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
    output = shlex.quote(f"--output={log_dir.absolute()}/rank-%t.log")
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in [*lines, "--requeue", *slurm.directives]),
            "# Written by Millrace; it is written anew each time the run is started.",
            *slurm.setup,
            *exports,
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"MASTER_PORT=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))",
            f"export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE={config.num_ranks}",
            f"srun --kill-on-bad-exit=1 --open-mode=append {output} \\",
            f"  bash -c {shlex.quote(f'export {numbers}; exec {rank}')}",
            "code=$?",
            f"# {EXIT_PREEMPTED}: the ranks were sent SIGTERM and have saved; the job waits for room again.",
            f'if [ "$code" -eq {EXIT_PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )


class SlurmRanks:
    """The ranks of one Slurm job.

    Raises:
        NotSubmitted: `launcher.submit=false`.
        RankError: sbatch refused the script.
    """

    def __init__(self, module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._world_size = config.world_size
        script = log_dir.absolute() / SCRIPT
        script.write_text(slurm_script(module, argument, config, log_dir))
        if not config.submit:
            raise NotSubmitted(
                f"launcher.submit=false: {script} is written and not submitted. Submit it with `sbatch {script}`; when "
                "the job is done, the same command goes on from what it trained."
            )
        self._job = _job_at_work(log_dir) or _slurm("sbatch", "--parsable", str(script)).partition(";")[0]
        (log_dir / JOB_ID).write_text(self._job)
        self._state = "PENDING"
        self._codes: dict[int, int] = {}
        self._asked_at = 0.0

    def running(self) -> bool:
        """Whether the job waits or runs.

        Raises:
            RankError: It has ended otherwise than well.
        """
        if time.monotonic() - self._asked_at < POLL_INTERVAL_S:
            return not self._codes
        self._asked_at = time.monotonic()
        facts = _job_facts(self._job)
        self._state = facts["JobState"]
        if self._state == "COMPLETED":
            self._codes = dict.fromkeys(range(self._world_size), 0)
        elif self._state not in (*WAITING, "RUNNING"):
            spoken = sorted(self._log_dir.glob("rank-*.error"))
            words = f": {spoken[0].read_text().strip()}" if spoken else f"; its last lines:\n{self._last_lines()}"
            reason = f"state {self._state}, exit code {facts.get('ExitCode')}, reason {facts.get('Reason')}"
            raise RankError(f"Slurm job {self._job} has ended: {reason}{words}", comes_again=bool(spoken))
        return not self._codes

    def at_work(self) -> bool:
        """Whether the job is running now."""
        return self._state == "RUNNING"

    def exit_codes(self) -> dict[int, int]:
        """All zero, once the job has completed."""
        return self._codes

    def ask_to_save(self) -> None:
        """Has Slurm send SIGTERM to the ranks; the job then goes back to the queue, from which `stop` takes it."""
        if self._state == "RUNNING":
            _slurm("scancel", "--signal=TERM", self._job)
            self._asked_at = 0.0

    def stop(self) -> None:
        """Cancels the job, unless it has completed."""
        if not self._codes:
            _slurm("scancel", self._job)

    def _last_lines(self) -> str:
        path = self._log_dir / f"slurm-{self._job}.log"
        return last_lines(path) + f"\n  | The ranks' own words are in {self.log_path(0)} and beside it."

    def log_path(self, rank: int) -> Path:
        """`rank-<n>.log`, on the shared file system."""
        return self._log_dir / f"rank-{rank}.log"


def _job_at_work(log_dir: Path) -> str | None:
    """The job of an earlier flow that was killed, if it still waits or runs: two would train over each other."""
    path = log_dir / JOB_ID
    if not path.exists():
        return None
    try:
        state = _job_facts(path.read_text())["JobState"]
    except RankError:  # long forgotten
        return None
    return path.read_text() if state in (*WAITING, "RUNNING") else None


def _job_facts(job: str) -> dict[str, str]:
    shown = _slurm("scontrol", "show", "job", job, "--oneliner")
    return {name: value for name, _, value in (word.partition("=") for word in shown.split())}


def _slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RankError(f"`{shlex.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()
