"""One small run of the whole chain, typed as a user types it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.flows.workplace import Done, Workplace


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, Done]:
    """`python -m flows.train +experiment=smoke`, from nothing; not to be changed."""
    place = Workplace(tmp_path_factory.mktemp("smoke") / "first")
    return place, place.run("train", "+experiment=smoke")


@pytest.fixture
def workplace(first_run: tuple[Workplace, Done], api_url: str, tmp_path: Path) -> Iterator[Workplace]:
    """What the first run left, in its place, to be damaged at will: it is put back afterwards.

    Its commands report to a server that runs already.
    """
    place, done = first_run
    assert done.returncode == 0, done.stderr
    shutil.copytree(place.root, tmp_path / "whole")
    yield replace(place, api_url=api_url)
    shutil.rmtree(place.root)
    shutil.move(tmp_path / "whole", place.root)


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], Any]], Any]:
    """Waits for a condition, not for a time."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 300
        while not (value := condition()):
            assert time.monotonic() < deadline, "gave up waiting"
            time.sleep(0.02)
        return value

    return wait


@pytest.fixture(scope="session")
def api_url(tmp_path_factory: pytest.TempPathFactory, until: Callable[[Callable[[], Any]], Any]) -> Iterator[str]:
    """A Prefect server of our own, with all its services."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_DEPLOYMENT_CONCURRENCY_SLOT_WAIT_SECONDS": "1",
    }
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            cwd=home,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def healthy() -> bool:
        assert server.poll() is None, (home / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, TimeoutError):
            return False

    try:
        until(healthy)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
