"""Ranks forked from a process that has imported torch and DeepSpeed: real, without seconds of imports each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

BODY = Path(__file__).with_name("preloaded_rank_body.py")
started: list[PreloadedRank] = []
"""Every rank of this test session, the last one last."""
_popen = subprocess.Popen
_context = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Starts the process that ranks are forked from; one thread each, as its environment says."""
    _context.set_forkserver_preload(
        ["flows.training.loop", "torch._dynamo", "deepspeed.moe.utils", "pytest", "transformers"]
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # read when torch is imported
        environment.setenv("DS_ACCELERATOR", "cpu")  # and this when DeepSpeed is
        forkserver.ensure_running()


def popen(command: list[str], **settings: Any) -> Any:
    """`subprocess.Popen`, but for ranks that train."""
    if command[1] == "-m" and command[2].startswith(("flows.training", "tests.training")):
        return PreloadedRank(command, settings["env"], settings["stdout"])
    return _popen(command, **settings)


def running() -> list[PreloadedRank]:
    """Ranks that have not ended."""
    return [rank for rank in started if rank.poll() is None]


class PreloadedRank:
    """What `flows.launcher` uses of `subprocess.Popen`."""

    def __init__(self, command: list[str], env: Mapping[str, str], stdout: Any) -> None:
        settings = {"environment": dict(env), "log_path": stdout.name, "arguments": command[2:]}
        # run_path is importable wherever the child looks; a function of this file would not be.
        self._process: ForkServerProcess = _context.Process(target=runpy.run_path, args=(str(BODY), settings))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.number = int(env["RANK"])
        started.append(self)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)
