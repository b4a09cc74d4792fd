"""How the workers share the tests: what needs the same costly fixture together, the longest first."""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

TOGETHER = ("tests/flows/", "tests/serving/", "tests/training/")
"""Directories whose files go to one worker: they share a run of the whole chain, programs, imports of their ranks."""
LONG = (*TOGETHER, "tests/kernels/test_in_interpreter.py")
"""What is handed out first, so that no worker is left with it when the other has done the rest."""

if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is imported; threads of two workers wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class FilesTogether(LoadFileScheduling):
    """A file goes to one worker, and so do all files of some directories."""

    def _split_scope(self, nodeid: str) -> str:
        together = (place for place in TOGETHER if nodeid.startswith(place))
        return next(together, super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether | None:
    return FilesTogether(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {place: rank for rank, place in enumerate(LONG)}
    items.sort(
        key=lambda item: min((ranks[place] for place in LONG if item.nodeid.startswith(place)), default=len(LONG))
    )
