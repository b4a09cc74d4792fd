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
from contextlib import ExitStack

from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.config import RunError
from flows.launcher import STOP_GRACE_S, free_port, stop_sessions

STARTUP_TIMEOUT_S = 180.0
"""A first start creates Prefect's database."""
SERVER = """
import sys
from flows.launcher import follow_parent
follow_parent()
import uvicorn
uvicorn.run("prefect.server.api.server:create_app", factory=True, port=int(sys.argv[1]), log_level="error")
"""


def start_prefect_api() -> None:
    """Makes sure that there is a Prefect API: the configured server, or a temporary one on loopback.

    The temporary one is stopped when the interpreter exits, after Prefect's own threads have sent their last events to
    it, and the kernel ends it if this process is killed.

    Raises:
        RunError: The temporary server did not start.
    """
    if PREFECT_API_URL.value():
        return
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        env={**os.environ, "PARENT_PID": str(os.getpid()), "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT_UI_ENABLED": "0"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    at_exit = ExitStack()
    at_exit.callback(stop_sessions, [server], STOP_GRACE_S)
    atexit.register(at_exit.close)
    _wait_until_healthy(server, f"http://127.0.0.1:{port}/api/health")
    at_exit.enter_context(temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}))


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
