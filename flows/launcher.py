"""Starts the ranks of a training stage on this machine, watches them, and never leaves one behind."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flows.config import RunError
from flows.config.launcher import LauncherConfig

POLL_INTERVAL_S = 0.1
STOP_GRACE_S = 5.0
"""Ranks get this long between SIGTERM and SIGKILL."""
LAST_LINES = 12
PR_SET_PDEATHSIG = 1


class RankError(RunError):
    """A rank failed, died or hung; the message holds its number, its exit code and its last lines."""


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log_path: Path
    heartbeat_path: Path

    def last_lines(self) -> str:
        lines = self.log_path.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
        return "\n".join(f"  | {line}" for line in lines)


def launch_ranks(
    module: str, argument: Path, config: LauncherConfig, log_dir: Path, on_poll: Callable[[], None] = lambda: None
) -> None:
    """Runs `python -m module argument` once per rank and returns when all have ended well.

    Each rank writes to `rank-<n>.log` in `log_dir` and touches `rank-<n>.heartbeat` there (see `Heartbeat`). The ranks
    die with this process, whatever ends it. Any rank can be run again by hand with the line at the top of its log.

    Args:
        module: Module with a `__main__`; it calls `follow_parent` first.
        argument: Path handed to every rank.
        config: Number of ranks, threads and the time after which a silent rank counts as hung.
        log_dir: Made if it does not exist.
        on_poll: Called about ten times a second while ranks run, to draw progress.

    Raises:
        RankError: The first rank that failed; the others have been stopped.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    ranks: list[_Rank] = []
    port = free_port()
    try:
        for number in range(config.num_ranks):
            ranks.append(_start_rank(number, module, argument, config, log_dir, port))
        while any(rank.process.poll() is None for rank in ranks):
            _raise_for_failed(ranks)
            _raise_for_stalled(ranks, config.stall_timeout_s)
            on_poll()
            time.sleep(POLL_INTERVAL_S)
        _raise_for_failed(ranks)
        on_poll()
    finally:
        _stop([rank.process for rank in ranks])


def _start_rank(number: int, module: str, argument: Path, config: LauncherConfig, log_dir: Path, port: int) -> _Rank:
    variables = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": config.num_ranks,
        "LOCAL_WORLD_SIZE": config.num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads_per_rank(config),
        "GOMP_SPINCOUNT": 1000,  # as fast on quiet cores; 1.7 x as fast where others work too, than spinning for longer
        "PARENT_PID": os.getpid(),
        "PYTHONUNBUFFERED": 1,
    }
    own = {name: str(value) for name, value in variables.items()}
    command = [sys.executable, "-m", module, str(argument)]
    log_path, heartbeat_path = log_dir / f"rank-{number}.log", log_dir / f"rank-{number}.heartbeat"
    heartbeat_path.touch()
    with log_path.open("wb") as log:
        shown = " ".join(f"{name}={value}" for name, value in own.items() if name != "PARENT_PID")
        log.write(f"$ {shown} {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the flow alone, which then stops the ranks in order
        )
    return _Rank(number, process, log_path, heartbeat_path)


def threads_per_rank(config: LauncherConfig) -> int:
    """CPU threads that each rank may use."""
    return config.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // config.num_ranks)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _raise_for_failed(ranks: list[_Rank]) -> None:
    for rank in ranks:
        code = rank.process.poll()
        if code:
            ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            spoken = rank.log_path.with_suffix(".error")
            if spoken.exists():
                raise RankError(f"rank {rank.number} {ending}: {spoken.read_text().strip()}")
            raise RankError(f"rank {rank.number} {ending}; its last lines ({rank.log_path}):\n{rank.last_lines()}")


def _raise_for_stalled(ranks: list[_Rank], timeout_s: float) -> None:
    for rank in ranks:
        silent_s = time.time() - rank.heartbeat_path.stat().st_mtime
        if silent_s > timeout_s and rank.process.poll() is None:
            for other in ranks:  # every rank writes its stack to its log: a hang is rarely where it shows
                other.process.send_signal(signal.SIGUSR1)
            time.sleep(10 * POLL_INTERVAL_S)
            raise RankError(
                f"rank {rank.number} gave no sign of life for {silent_s:.0f} s, more than "
                f"launcher.stall_timeout_s={timeout_s}; the stacks of all ranks are in their logs:\n{rank.last_lines()}"
            )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_GRACE_S
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        with suppress(ProcessLookupError):  # the session, so that nothing that a rank started stays behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def follow_parent() -> None:
    """Ties this rank's life to the process that launched it; called by a rank before anything else.

    The kernel sends SIGKILL when the launching process ends, even by SIGKILL. SIGUSR1 prints every thread's stack.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    parent = os.environ.get("PARENT_PID")
    if parent is None:  # run by hand
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


class Heartbeat:
    """A rank's sign of life."""

    def __init__(self, log_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._path = log_dir / f"rank-{environment.get('RANK', '0')}.heartbeat"

    def beat(self) -> None:
        """Says that work is going on."""
        self._path.touch()


def speak_error(log_dir: Path, message: str) -> None:
    """Leaves a message for the user in place of this rank's last log lines."""
    (log_dir / f"rank-{os.environ.get('RANK', '0')}.error").write_text(message)
