"""One small run of the whole chain, typed as a user types it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
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
def workplace(first_run: tuple[Workplace, Done], tmp_path: Path) -> Iterator[Workplace]:
    """What the first run left, in its place, to be damaged at will: it is put back afterwards."""
    place, done = first_run
    assert done.returncode == 0, done.stderr
    shutil.copytree(place.root, tmp_path / "whole")
    yield place
    shutil.rmtree(place.root)
    shutil.move(tmp_path / "whole", place.root)


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
