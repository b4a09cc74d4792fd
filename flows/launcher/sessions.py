"""Processes that lead sessions of their own: how they are ended, with everything that they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

STOP_GRACE_S = 5.0
"""Time between SIGTERM and SIGKILL for what has something to put away."""


def stop_sessions(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Ends processes that were started with `start_new_session=True`, and whatever is left in their sessions.

    Args:
        processes: May have ended already.
        grace_s: Seconds between SIGTERM and SIGKILL, for all of them together; 0 = SIGKILL at once.
    """
    running = [process for process in processes if process.poll() is None]
    if grace_s:
        for process in running:
            process.terminate()
        deadline = time.monotonic() + grace_s
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of that address of ours that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
