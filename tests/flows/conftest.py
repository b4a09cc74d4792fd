"""One small run of the whole chain, typed as a user types it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.flows.workplace import Done, Workplace


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, Done]:
    """`python -m flows.train +experiment=smoke`, from nothing; not to be changed."""
    place = Workplace(tmp_path_factory.mktemp("smoke") / "first")
    return place, place.run("train", "+experiment=smoke")


@pytest.fixture
def workplace(first_run: tuple[Workplace, Done], tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A copy of what the first run left, to be damaged at will."""
    first, done = first_run
    assert done.returncode == 0, done.stderr
    place = Workplace(first.root.parent / tmp_path_factory.mktemp("copy").name)
    shutil.copytree(first.root, place.root)
    return place


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Any]:
    """Waits for a condition, not for a time."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 120
        while not (value := condition()):
            assert time.monotonic() < deadline, "gave up waiting"
            time.sleep(0.02)
        return value

    return wait
