"""Ranks on this machine, started by this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from flows.config.launcher import LauncherConfig
from flows.launcher.rank import STACKS_AFTER
from flows.launcher.sessions import free_port, stop_sessions


class LocalRanks:
    """Ranks of this machine, each in a session of its own with its own log.

    Args:
        command: What each of them runs.
        numbers: Rank -> local rank.
        environment: Variables that all of them get besides this process's own.
        log_dir: Where they write.
    """

    def __init__(
        self, command: list[str], numbers: Mapping[int, int], environment: Mapping[str, str], log_dir: Path
    ) -> None:
        self._log_dir = log_dir
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for rank, local_rank in numbers.items():
                own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), **environment}
                self._processes[rank] = self._start(rank, command, own)
        except BaseException:
            self.stop()
            raise

    def _start(self, rank: int, command: list[str], own: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self.log_path(rank).open("wb") as log:
            shown = " ".join(f"{name}={value}" for name, value in own.items())
            log.write(f"$ {shown} {' '.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command,
                env={**os.environ, **own, "PARENT_PID": str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the flow alone, which then stops the ranks in order
            )

    def running(self) -> bool:
        """Whether any of them is."""
        return any(process.poll() is None for process in self._processes.values())

    def at_work(self) -> bool:
        """Always."""
        return True

    def exit_codes(self) -> dict[int, int]:
        """By rank, of those that have ended."""
        ended = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: code for rank, code in ended.items() if code is not None}

    def ask_to_save(self) -> None:
        """Sends SIGTERM."""
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Sends SIGKILL: checkpoints are complete or ignored, so a rank has nothing to put away."""
        stop_sessions(list(self._processes.values()), 0)

    def log_path(self, rank: int) -> Path:
        """`rank-<n>.log`."""
        return self._log_dir / f"rank-{rank}.log"


def start_local(module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> LocalRanks:
    """All ranks of a run, on this machine.

    Args:
        module: What each rank runs with `python -m`.
        argument: File that it is given.
        config: The launcher.
        log_dir: Of this launch; each rank writes its own file there.
    """
    numbers = {number: number for number in range(config.num_ranks)}
    environment = rank_environment(config, "127.0.0.1", free_port()) | thread_environment(config)
    return LocalRanks(rank_command(module, argument), numbers, environment, log_dir)


def rank_command(module: str, argument: Path) -> list[str]:
    """What every rank runs."""
    return [sys.executable, "-m", module, str(argument)]


def rank_environment(config: LauncherConfig, leader: str, port: int) -> dict[str, str]:
    """Variables that every rank gets, besides its numbers.

    Args:
        config: The launcher.
        leader: Address of rank 0, where the ranks meet.
        port: Free port there.
    """
    return {
        "WORLD_SIZE": str(config.world_size),
        "LOCAL_WORLD_SIZE": str(config.num_ranks),
        "MASTER_ADDR": leader,
        "MASTER_PORT": str(port),
        **process_environment(config),
    }


def process_environment(config: LauncherConfig) -> dict[str, str]:
    """Variables of a rank that do not depend on where it meets the others."""
    interface = config.network_interface
    return {
        "GOMP_SPINCOUNT": "1000",  # as fast on quiet cores; 1.7 x as fast where others work too, than spinning longer
        "PYTHONUNBUFFERED": "1",
        STACKS_AFTER: str(config.stall_timeout_s),
        **({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}),
    }


def thread_environment(config: LauncherConfig) -> dict[str, str]:
    """Variable that shares out the cores of the machine on which it is called."""
    threads = config.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // config.num_ranks)
    return {"OMP_NUM_THREADS": str(threads)}
