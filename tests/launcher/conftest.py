"""Small programs for ranks to run, and what is left of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

DEADLINE_S = 60.0
ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from flows.launcher import EXIT_PREEMPTED, Heartbeat, asked_to_save, follow_parent, save_on_sigterm, speak_error
follow_parent()
save_on_sigterm()
rank = int(os.environ["RANK"])
log_dir = Path(sys.argv[1])
"""


@pytest.fixture
def rank_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module for ranks to run, from its body."""

    def write(body: str) -> str:
        (tmp_path / "rank_under_test.py").write_text(PREAMBLE + body)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
        return "rank_under_test"

    return write


@pytest.fixture
def leftovers(tmp_path: Path) -> Callable[[], list[str]]:
    """Command lines of processes of this test that still run: ranks, and whatever started them."""

    def find() -> list[str]:
        lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
        return [line for line in lines if str(tmp_path) in line]

    return find


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Any]:
    """Waits for a condition, not for a time."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, "gave up waiting"
            time.sleep(0.01)
        return value

    return wait
