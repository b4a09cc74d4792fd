"""Ranks killed at a chosen moment of a real run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.artifact import Artifact
from flows.launcher import RankError
from tests.training.preloaded_ranks import running

DEADLINE_S = 90.0


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.005)
    return value


def kill(rank: int) -> None:
    """SIGKILL to one of the ranks that run."""
    (victim,) = [process for process in running() if process.number == rank]
    os.kill(victim.pid, signal.SIGKILL)


def interrupted(
    train: Callable[[], Artifact], store: Path, checkpoint: str, happens: Callable[[], object] = lambda: kill(0)
) -> RankError:
    """Lets something happen as soon as a checkpoint is complete; the error that the run then ends with."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            train()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: list(store.glob(f"*.partial/checkpoints/{checkpoint}")) or errors)
    assert not errors, errors
    happens()
    thread.join(DEADLINE_S)
    assert len(errors) == 1
    assert isinstance(errors[0], RankError)
    assert not running()
    return errors[0]
