"""A run that loses a rank, is preempted, and goes on has the losses of a run that nothing happened to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.artifact import Artifact
from flows.config.training import TrainingRun
from flows.launcher import Preempted

DEADLINE_S = 90.0


def ranks_of_this_process() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # also a zombie
            if "flows.training" in process.cmdline():
                found.append(process)
    return found


def rank(number: int) -> psutil.Process:
    """A rank that trains already: one that has been started again is another process."""
    return next(p for p in ranks_of_this_process() if p.environ()["RANK"] == str(number))


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.005)


@pytest.mark.distributed
def test_killed_restarted_preempted_and_resumed_equals_undisturbed(
    trained: Callable[..., Artifact],
    tiny_run: Callable[..., TrainingRun],
    losses: Callable[[Artifact], list[float]],
    tmp_path: Path,
) -> None:
    run = tiny_run(ranks=2, max_steps=120, checkpoint_interval_steps=10, eval_interval_steps=60)
    metrics = "store/*.partial/logs/metrics.jsonl"
    ends: list[BaseException] = []

    def train() -> None:
        try:
            trained(replace(run, launcher=replace(run.launcher, max_restarts=1)))
        except BaseException as error:
            ends.append(error)

    def step() -> int:
        """Steps that are logged; those after the last checkpoint are dropped when a rank is started again."""
        return sum(len(path.read_text().splitlines()) for path in tmp_path.glob(metrics))

    thread = threading.Thread(target=train)
    thread.start()
    until(lambda: step() > 12)
    first = rank(1)
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not first.is_running() and len(ranks_of_this_process()) == 2 and step() > 30)
    os.kill(rank(1).pid, signal.SIGTERM)
    thread.join(DEADLINE_S)
    (end,) = ends
    assert isinstance(end, Preempted), end
    assert not ranks_of_this_process()
    (newest,) = sorted(path.parent.name for path in tmp_path.glob("store/*.partial/checkpoints/step-*/complete.json"))[
        -1:
    ]
    saved = int(newest.removeprefix("step-"))
    log = next(tmp_path.glob("store/*.partial/logs/rank-0.log")).read_text()
    assert f"stopped by SIGTERM after step {saved}, which is saved" in log
    resumed = trained(run)
    assert resumed.metrics["resumed_from_step"] == saved
    assert losses(resumed) == losses(trained(run, store="undisturbed"))
