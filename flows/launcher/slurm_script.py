"""The script of a Slurm job: srun starts the ranks, and a job whose ranks have all saved queues again by itself."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from flows.config.launcher import SLURM_WARNING_S, LauncherConfig
from flows.launcher.local import process_environment, rank_command
from flows.launcher.rank import EXIT_PREEMPTED

FIRST_PORT, PORTS = 20_000, 10_000
"""Below the ports that Linux hands out by itself; jobs that share a node differ in their last digits."""


def slurm_script(module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> str:
    """The job script that runs `python -m module argument` once per rank.

    Args:
        module: What each rank runs with `python -m`.
        argument: File that it is given.
        config: The launcher.
        log_dir: Of this launch, on the file system that all nodes share.
    """
    logs = log_dir.absolute()
    output = str(logs).replace("%", "%%")  # % stands for what Slurm fills in
    environment = {**process_environment(config), "OMP_NUM_THREADS": "${SLURM_CPUS_PER_TASK:-1}"}
    if config.threads_per_rank:
        environment["SRUN_CPUS_PER_TASK"] = "$SLURM_CPUS_PER_TASK"  # since 22.05 srun does not take it over by itself
    if path := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] = shlex.quote(path)
    wrapped = [sys.executable, "-m", "flows.launcher.slurm_rank", str(logs), *rank_command(module, argument.absolute())]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in _directives(config, logs.parent.name, output)),
            "# Written by Millrace; it is written anew each time the run is started.",
            *config.slurm.setup,
            *(f"export {name}={value}" for name, value in environment.items()),
            "# The address under which Slurm itself reaches the first node: its name need not mean anything to others.",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            """MASTER_ADDR=$(scontrol show node "$first" --oneliner | sed 's/.* NodeAddr=\\([^ ]*\\).*/\\1/')""",
            f"MASTER_PORT=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))",
            f"export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE={config.num_ranks}",
            f"rm -f {shlex.quote(str(logs))}/rank-*.exit",
            f"srun --kill-on-bad-exit=1 --open-mode=append {shlex.quote(f'--output={output}/rank-%t.log')} \\",
            f"  {shlex.join(wrapped)}",
            "code=$?",
            f"# {EXIT_PREEMPTED}: all ranks were sent SIGTERM and have saved; the job waits for room again.",
            f'if [ "$code" -eq {EXIT_PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )


def _directives(config: LauncherConfig, stage: str, output: str) -> list[str]:
    slurm = config.slurm
    options = {
        "job-name": f"millrace-{stage.removesuffix('.partial')}",
        "nodes": config.num_nodes,
        "ntasks-per-node": config.num_ranks,
        "cpus-per-task": config.threads_per_rank or None,
        "gpus-per-node": config.num_ranks * config.gpus_per_rank or None,
        "time": slurm.time_limit,
        "partition": slurm.partition or None,
        "account": slurm.account or None,
        "qos": slurm.qos or None,
        "chdir": os.getcwd(),
        "output": f"{output}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{SLURM_WARNING_S}",
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*lines, "--requeue", *slurm.directives]
