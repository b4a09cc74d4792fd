"""Ranks as a Slurm job that this process submits, follows through the queue, and takes back when it ends before it."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from flows.config import ConfigError
from flows.config.launcher import LauncherConfig
from flows.launcher.outcome import NotSubmitted, RankError, exit_codes_left, last_lines
from flows.launcher.rank import EXIT_PREEMPTED
from flows.launcher.slurm_script import slurm_script

SCRIPT = "job.sbatch"
JOB_ID = "job.id"
POLL_INTERVAL_S = 5.0
"""Slurm's controller is shared by everybody; its jobs stay known to it for MinJobAge, 300 s by default."""
STOP_POLL_INTERVAL_S = 0.5
STOP_TIMEOUT_S = 120.0
"""Four times as long as Slurm by default leaves between SIGTERM and SIGKILL (KillWait)."""
SUBMIT_TIMEOUT_S = 60.0
"""How long an interrupted command waits for the number of the job that it was submitting."""
FORGOTTEN = "Invalid job id"
"""In what Slurm says of a job that ended some minutes ago, or that it never had."""
CANCELLED, COMPLETED, PREEMPTED, RUNNING = "CANCELLED", "COMPLETED", "PREEMPTED", "RUNNING"
ENDED = {
    COMPLETED: "",
    "FAILED": "failed",
    CANCELLED: "was cancelled by somebody else",
    PREEMPTED: "was preempted",
    "TIMEOUT": "reached its time limit before the ranks had saved; see launcher.slurm.time_limit",
    "NODE_FAIL": "lost a node",
    "BOOT_FAIL": "got a node that did not start",
    "OUT_OF_MEMORY": "used more memory than it had asked for; ask for more with launcher.slurm.directives=[--mem=64G]",
    "DEADLINE": "reached its deadline",
}
"""State -> what a user is told. A job in any other state waits, runs or is being put away."""
FINAL = (CANCELLED, "OUT_OF_MEMORY", "DEADLINE")
"""Would end the same way, or is what somebody wanted: the job is not submitted again."""

logger = logging.getLogger(__name__)


class NoAnswer(RankError):
    """Slurm's controller cannot be asked at the moment; its jobs go on without it."""


class SlurmRanks:
    """The ranks of one Slurm job.

    Raises:
        NotSubmitted: `launcher.submit=false`.
        RankError: sbatch refused the script, or Slurm does not answer.
    """

    def __init__(self, module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._config = config
        self._script = log_dir.absolute() / SCRIPT
        self._script.write_text(slurm_script(module, argument, config, log_dir))
        if not config.submit:
            raise NotSubmitted(
                f"launcher.submit=false: {self._script} is written and not submitted. Submit it with `sbatch "
                f"{self._script}`; when the job is done, the same command goes on from what it trained."
            )
        self._codes: dict[int, int] = {}
        self._facts: dict[str, str] = {"JobState": "PENDING"}
        self._asked_at = 0.0
        self._answers = True
        self._saving = False
        adopted = _job_at_work(log_dir)
        self._job = adopted or self._submit()
        logger.info("Slurm job %s %s", self._job, "of an earlier command goes on" if adopted else "is submitted")

    @property
    def _state(self) -> str:
        return self._facts["JobState"]

    def running(self) -> bool:
        """Whether the job waits or runs.

        Raises:
            RankError: It has ended otherwise than well, for another reason than that a rank failed.
        """
        if self._saving and len(codes := exit_codes_left(self._log_dir)) == self._config.world_size:
            self._codes = codes
        if self._codes or time.monotonic() - self._asked_at < POLL_INTERVAL_S:
            return not self._codes
        self._asked_at = time.monotonic()
        self._ask()
        if self._state == COMPLETED:
            self._codes = dict.fromkeys(range(self._config.world_size), 0)
        elif self._state == PREEMPTED and not self._saving:  # by a cluster that does not queue such a job again itself
            self._job = self._submit()
            logger.info("it was preempted, and is submitted again as Slurm job %s", self._job)
        elif self._state in ENDED:
            # Ranks that saved, or that were stopped because another had failed, are not the cause.
            left = exit_codes_left(self._log_dir).items()
            causes = {rank: code for rank, code in left if code not in (0, EXIT_PREEMPTED, -signal.SIGTERM)}
            if self._state != "FAILED" or not causes:
                raise self._failed()
            self._codes = causes
        return not self._codes

    def at_work(self) -> bool:
        """Whether the job was running when Slurm last answered."""
        return self._state == RUNNING

    def exit_codes(self) -> dict[int, int]:
        """By rank, once the job has ended or the ranks have saved as asked: a job that is requeued has not ended."""
        return self._codes

    def ask_to_save(self) -> None:
        """Has Slurm send SIGTERM to the ranks; the job then goes back to the queue, from which `stop` takes it."""
        if self._state == RUNNING:
            self._saving = True
            with suppress(RankError):  # it has ended meanwhile, or will not hear of it: then no rank says that it saved
                _slurm("scancel", "--signal=TERM", self._job)

    def stop(self) -> None:
        """Cancels the job and waits until nothing of it runs, unless it has ended."""
        if self._state in ENDED:
            return
        deadline = time.monotonic() + STOP_TIMEOUT_S
        logger.info("waiting for Slurm job %s to end", self._job)
        try:
            _slurm("scancel", self._job)
            while time.monotonic() < deadline:
                if (facts := _job_facts(self._job)) is None or facts["JobState"] in ENDED:
                    return
                time.sleep(STOP_POLL_INTERVAL_S)
        except NoAnswer as error:
            logger.error("Slurm job %s goes on: %s. Stop it with `scancel %s`.", self._job, error, self._job)
        else:
            logger.error("Slurm job %s has not ended %g s after `scancel`.", self._job, STOP_TIMEOUT_S)

    def log_path(self, rank: int) -> Path:
        """`rank-<n>.log`, on the shared file system."""
        return self._log_dir / f"rank-{rank}.log"

    def _ask(self) -> None:
        """Brings `_facts` up to date, and says so when they mean something new to who waits."""
        try:
            facts = _job_facts(self._job)
        except NoAnswer as error:
            if self._answers:
                logger.warning("%s; Slurm job %s goes on meanwhile, and so does this command", error, self._job)
            self._answers = False
            return
        if not self._answers:
            logger.info("Slurm answers again")
        self._answers = True
        if facts is None:  # it ended while nobody asked
            codes = exit_codes_left(self._log_dir)
            well = len(codes) == self._config.world_size and not any(codes.values())
            facts = {"JobState": COMPLETED if well else "FAILED", "Reason": "Slurm has forgotten the job"}
        before, now = _in_words(self._facts), _in_words(facts)
        self._facts = facts
        if now != before:
            logger.info("Slurm job %s: %s", self._job, now)

    def _failed(self) -> RankError:
        spoken = sorted(self._log_dir.glob("rank-*.error"))
        log = self._log_dir / f"slurm-{self._job}.log"
        if spoken:
            words = spoken[0].read_text().strip()
        else:
            words = f"its last lines ({log}):\n{last_lines(log)}\n  | Its ranks' own: {self.log_path(0)} and beside it."
        facts = f"state {self._state}, exit code {self._facts.get('ExitCode')}, reason {self._facts.get('Reason')}"
        again = bool(spoken) or self._state in FINAL
        return RankError(f"Slurm job {self._job} {ENDED[self._state]} ({facts}); {words}", comes_again=again)

    def _submit(self) -> str:
        """Submits the script; the job's number. A command that is interrupted meanwhile leaves no job behind."""
        for path in self._log_dir.glob("rank-*.exit"):
            path.unlink()
        command = ["sbatch", "--parsable", str(self._script)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=submitter_environment(),
            start_new_session=True,  # Ctrl-C would leave it unsaid whether the job was submitted
        )
        try:
            said, errors = process.communicate()
        except BaseException:
            said, _ = process.communicate(timeout=SUBMIT_TIMEOUT_S)
            if job := said.strip().partition(";")[0]:
                _slurm("scancel", job)
            raise
        if process.returncode:
            raise RankError(refusal(self._config, errors), comes_again=True)
        job = said.strip().partition(";")[0]
        (self._log_dir / JOB_ID).write_text(job)
        self._facts = {"JobState": "PENDING"}
        return job


def check_submission(config: LauncherConfig) -> None:
    """Raises ConfigError if Slurm would not take a job of this kind: it is asked without submitting one.

    What may pass, such as nodes that are drained or a controller that does not answer, is only a warning.
    """
    script = slurm_script("flows.training", Path("run.json"), config, Path("logs"))
    done = subprocess.run(
        ["sbatch", "--test-only"],
        input=script,
        capture_output=True,
        text=True,
        env=submitter_environment(),
        check=False,
    )
    if done.returncode and "invalid" in done.stderr.lower():
        raise ConfigError(refusal(config, done.stderr))
    if done.returncode:
        logger.warning("Slurm could not start such a job at present, which would wait: %s", done.stderr.strip())


def refusal(config: LauncherConfig, errors: str) -> str:
    """What a user is told when sbatch says no.

    Args:
        config: What was asked for.
        errors: sbatch's own words.
    """
    slurm = config.slurm
    asked = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time_limit": slurm.time_limit}
    fields = ", ".join(f"launcher.slurm.{name}={value}" for name, value in asked.items() if value)
    numbers = f"{config.num_nodes} node(s) of {config.num_ranks} rank(s) with {config.gpus_per_rank} GPU(s) each"
    words = "; ".join(line.removeprefix("sbatch: error: ").strip() for line in errors.strip().splitlines())
    return (
        f"{fields}: Slurm refused a job of {numbers}: {words}. Set them to what this cluster has: `sinfo` shows its "
        "partitions, nodes and limits, `sacctmgr show associations user=$USER` your accounts."
    )


def submitter_environment() -> dict[str, str]:
    """Ours without what an allocation that this process may run in says of itself: sbatch would take it for options."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def _in_words(facts: dict[str, str]) -> str:
    state, reason = facts["JobState"], facts.get("Reason", "None")
    words = state if reason == "None" else f"{state} ({reason})"
    if state == RUNNING:
        words += f" on {facts.get('NodeList')}"
    elif state == "PENDING" and (start := facts.get("StartTime", "Unknown")) != "Unknown":
        words += f", to start at {start} or earlier"
    return words


def _job_at_work(log_dir: Path) -> str | None:
    """The job of an earlier flow that was killed, if it still waits or runs: two would train over each other."""
    path = log_dir / JOB_ID
    job = path.read_text() if path.exists() else ""
    facts = _job_facts(job) if job else None
    return job if facts and facts["JobState"] not in ENDED else None


def _job_facts(job: str) -> dict[str, str] | None:
    """What Slurm knows of a job, None if nothing any more. Raises NoAnswer."""
    try:
        shown = _slurm("scontrol", "show", "job", job, "--oneliner")
    except NoAnswer as error:
        if FORGOTTEN in str(error):
            return None
        raise
    return {name: value for name, _, value in (word.partition("=") for word in shown.split())}


def _slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoAnswer(f"`{shlex.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()
