"""A Prefect API for a run from the command line when no server is configured.

Prefect starts one by itself, but in our process group and without a tie to our life: Ctrl-C in a terminal ends it
before the run has reported its state, which then retries for minutes, and a killed run leaves it behind.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, suppress

from flows.config import RunError
from flows.launcher import STOP_GRACE_S, free_port, stop_sessions

STARTUP_TIMEOUT_S = 180.0
"""A first start creates Prefect's database."""
SERVER = """
import sys
from flows.launcher import follow_parent
follow_parent()
import uvicorn
from prefect.server.api.server import create_app
app = create_app()
port = sys.stdin.readline()
if port:
    uvicorn.run(app, port=int(port), log_level="error")
"""
"""Imports for seconds, which touches nothing, and serves once it is told where; or ends when nobody will tell it."""


class TemporaryServer:
    """A Prefect API for this process: the configured server, or a temporary one on loopback.

    The temporary one imports what it needs while its owner still reads and checks a configuration. It is stopped when
    the interpreter exits, after Prefect's own threads have sent their last events to it, and the kernel ends it if this
    process is killed.
    """

    def __init__(self) -> None:
        self._at_exit = ExitStack()
        atexit.register(self._at_exit.close)
        self._process = None if os.environ.get("PREFECT_API_URL") else self._prepare()

    def _prepare(self) -> subprocess.Popen[bytes]:
        ephemeral = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT_UI_ENABLED": "0"}
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env={**os.environ, "PARENT_PID": str(os.getpid()), **ephemeral},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._at_exit.callback(stop_sessions, [process], STOP_GRACE_S)
        return process

    def start(self) -> None:
        """Has an API answer, unless one does already.

        Raises:
            RunError: The temporary server did not start.
        """
        from prefect.settings import (  # takes a second
            PREFECT_API_URL,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
            temporary_settings,
        )

        if self._process is None:
            return
        if PREFECT_API_URL.value():  # a profile names a server
            self._at_exit.close()
        else:
            port = free_port()
            _tell(self._process, port)
            _wait_until_healthy(self._process, f"http://127.0.0.1:{port}/api/health")
            # nobody there watches heartbeats, and a run's end waits up to a second for their thread
            ours = {PREFECT_API_URL: f"http://127.0.0.1:{port}/api", PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
            self._at_exit.enter_context(temporary_settings(ours))
        self._process = None


def _tell(server: subprocess.Popen[bytes], port: int) -> None:
    assert server.stdin is not None
    with suppress(BrokenPipeError), server.stdin as words:  # one that has ended is reported by who waits for it
        words.write(f"{port}\n".encode())


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise RunError(
        f"Prefect's temporary server did not start: exit code {server.poll()} within {STARTUP_TIMEOUT_S:g} s. Its "
        "words are above. Start one with `prefect server start` and set PREFECT_API_URL to its address."
    )
