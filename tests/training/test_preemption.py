"""A run that loses a rank, is preempted, and goes on has the losses of a run that nothing happened to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.config.training import TrainingRun
from flows.launcher import Preempted
from tests.training.interruption import DEADLINE_S, kill, until
from tests.training.preloaded_ranks import PreloadedRank, running


def rank(number: int) -> PreloadedRank:
    """A rank that trains: one that has been started again is another process."""
    return next(one for one in running() if one.number == number)


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
    kill(1)
    until(lambda: first.poll() is not None and len(running()) == 2 and step() > 30)
    os.kill(rank(1).pid, signal.SIGTERM)
    thread.join(DEADLINE_S)
    (end,) = ends
    assert isinstance(end, Preempted), end
    assert not running()
    (newest,) = sorted(path.parent.name for path in tmp_path.glob("store/*.partial/checkpoints/step-*/manifest.json"))[
        -1:
    ]
    saved = int(newest.removeprefix("step-"))
    log = next(tmp_path.glob("store/*.partial/logs/rank-0.log")).read_text()
    assert f"stopped by SIGTERM after step {saved}, which is saved" in log
    resumed = trained(run)
    assert resumed.metrics["resumed_from_step"] == saved
    assert losses(resumed) == losses(trained(run, store="undisturbed"))
