"""One launch: ranks are started by whoever the configuration names, watched, and started again when that can help."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flows.config.launcher import LauncherConfig, LauncherKind
from flows.launcher.hostfile import HostRanks
from flows.launcher.kubernetes import KubernetesRanks
from flows.launcher.local import start_local
from flows.launcher.outcome import Preempted, RankError, is_preemption, last_lines
from flows.launcher.rank import EXIT_PREEMPTED, PREEMPTION_NOTE, REARM_S
from flows.launcher.rendezvous import LeadingNode
from flows.launcher.slurm import SlurmRanks

POLL_INTERVAL_S = 0.1
STALL_MARGIN_S = REARM_S + 2.0
"""A silent rank has printed its stacks when it is this much overdue."""

logger = logging.getLogger(__name__)


class Ranks(Protocol):
    """Ranks that have been started, wherever they are."""

    def running(self) -> bool:
        """Whether there is anything left to wait for. Raises RankError if what holds the ranks has failed."""

    def at_work(self) -> bool:
        """Whether signs of life can be expected; false while a job waits in a queue."""

    def exit_codes(self) -> dict[int, int]:
        """Exit codes of the ranks that are known to have ended, by rank; negative for signals."""

    def ask_to_save(self) -> None:
        """Sends SIGTERM to the ranks, which save and end with EXIT_PREEMPTED."""

    def stop(self) -> None:
        """Ends at once what is left of them, with all they started."""

    def log_path(self, rank: int) -> Path:
        """Where a rank's output is."""


def launch_ranks(
    module: str, argument: Path, config: LauncherConfig, log_dir: Path, on_poll: Callable[[], None] = lambda: None
) -> int:
    """Runs `python -m module argument` once per rank and returns when all have ended well.

    Each rank writes to `rank-<n>.log` in `log_dir` (torchrun: `node-*.log`) and touches `rank-<n>.heartbeat` there (see
    `Heartbeat`). Where they run on other machines, `log_dir` is on a file system that all share. The ranks end with
    this process, whatever ends it. A local rank can be run again by hand with the line at the top of its log.

    Args:
        module: Module with a `__main__`; it calls `follow_parent` and `save_on_sigterm` first.
        argument: Path handed to every rank.
        config: Who starts how many ranks where, and what happens when one fails.
        log_dir: Made if it does not exist.
        on_poll: Called about ten times a second while ranks run, to draw progress.

    Returns:
        How often the ranks had to be started again.

    Raises:
        RankError: The first rank that failed, once restarts are used up or could not help; the others were stopped.
        Preempted: The ranks were asked to stop, and have saved.
        NotSubmitted: `launcher.submit=false`: the job's file has been written.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    restarts = 0
    while True:
        try:
            _launch_once(module, argument, config, log_dir, on_poll)
        except RankError as error:
            if error.comes_again or restarts == config.max_restarts:
                raise
            restarts += 1
            logger.warning(
                "restart %d of launcher.max_restarts=%d, from the last checkpoint: %s",
                restarts,
                config.max_restarts,
                error,
            )
        else:
            return restarts


def _launch_once(
    module: str, argument: Path, config: LauncherConfig, log_dir: Path, on_poll: Callable[[], None]
) -> None:
    for pattern in ("rank-*.heartbeat", "rank-*.error", "node-*.json", PREEMPTION_NOTE):
        for path in log_dir.glob(pattern):
            path.unlink()
    ranks = _start(module, argument, config, log_dir)
    watch = _Watch(ranks, config, log_dir)
    try:
        while ranks.running():
            watch.look()
            on_poll()
            time.sleep(POLL_INTERVAL_S)
        watch.look()
        on_poll()
        watch.raise_if_preempted()
    except BaseException as error:
        if is_preemption(error):
            raise watch.wait_until_saved() from error
        raise
    finally:
        ranks.stop()


def _start(module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> Ranks:
    match config.kind:
        case LauncherKind.local:
            return start_local(module, argument, config, log_dir)
        case LauncherKind.rendezvous:
            return LeadingNode(module, argument, config, log_dir)
        case LauncherKind.hostfile:
            return HostRanks(module, argument, config, log_dir)
        case LauncherKind.slurm:
            return SlurmRanks(module, argument, config, log_dir)
        case LauncherKind.kubernetes:
            return KubernetesRanks(module, argument, config, log_dir)


class _Watch:
    """Tells from exit codes and heartbeats how the ranks are."""

    def __init__(self, ranks: Ranks, config: LauncherConfig, log_dir: Path) -> None:
        self._ranks = ranks
        self._config = config
        self._log_dir = log_dir
        self._seen: dict[int, tuple[float, float]] = {}
        """Each rank's last heartbeat, by the clock of whoever wrote the file, and when it was seen here, by ours."""
        self._preempted_at: float | None = None

    def look(self) -> None:
        """Raises RankError for the first rank that failed or hangs."""
        codes = self._ranks.exit_codes()
        for rank, code in sorted(codes.items(), key=lambda ended: (ended[1] >= 0, ended[0])):
            # a rank that was killed drags others down with it, and comes first
            if code not in (0, EXIT_PREEMPTED):
                raise self._failed(rank, code)
        now = time.monotonic()
        if EXIT_PREEMPTED in codes.values():  # the others are about to end like this
            self._preempted_at = self._preempted_at or now
            if now - self._preempted_at > self._config.preemption_grace_s:
                self.raise_if_preempted()
            return
        if not self._ranks.at_work():
            self._seen.clear()
            return
        for rank in range(self._config.world_size):
            if rank not in codes:
                self._raise_if_stalled(rank, now)

    def raise_if_preempted(self) -> None:
        """Raises Preempted if the ranks have saved and stopped."""
        if EXIT_PREEMPTED in self._ranks.exit_codes().values():
            raise Preempted("the ranks were sent SIGTERM, saved a checkpoint and stopped")

    def wait_until_saved(self) -> Preempted:
        """Asks the ranks to save and end; what to raise when they have, or the time is up."""
        self._ranks.ask_to_save()
        deadline = time.monotonic() + self._config.preemption_grace_s
        while self._ranks.running() and self._ranks.at_work() and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
        if EXIT_PREEMPTED in self._ranks.exit_codes().values():
            return Preempted("stopped by SIGTERM after the ranks had saved a checkpoint")
        return Preempted(
            f"stopped by SIGTERM; the ranks did not save within launcher.preemption_grace_s="
            f"{self._config.preemption_grace_s}, and earlier checkpoints stay as they are"
        )

    def _failed(self, rank: int, code: int) -> RankError:
        spoken = sorted(self._log_dir.glob("rank-*.error"))
        if spoken:  # the others failed because this one did
            speaker = int(spoken[0].stem.removeprefix("rank-"))
            code = self._ranks.exit_codes().get(speaker, code)
            return RankError(f"rank {speaker} {_ending(code)}: {spoken[0].read_text().strip()}", comes_again=True)
        log_path = self._ranks.log_path(rank)
        return RankError(f"rank {rank} {_ending(code)}; its last lines ({log_path}):\n{last_lines(log_path)}")

    def _raise_if_stalled(self, rank: int, now: float) -> None:
        path = self._log_dir / f"rank-{rank}.heartbeat"
        beat = path.stat().st_mtime if path.exists() else 0.0
        before, seen_at = self._seen.get(rank, (None, now))
        if before != beat:
            self._seen[rank] = (beat, now)
        elif (silent_s := now - seen_at) > self._config.stall_timeout_s + STALL_MARGIN_S:
            raise RankError(
                f"rank {rank} gave no sign of life for {silent_s:.0f} s, more than launcher.stall_timeout_s="
                f"{self._config.stall_timeout_s}; the stacks of all silent ranks are in their logs:\n"
                f"{last_lines(self._ranks.log_path(rank))}"
            )


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
