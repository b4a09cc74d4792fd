"""One run, several layouts: interrupted on some ranks at one ZeRO stage, taken up on others at another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.config.training import TrainingRun
from tests.training.interruption import interrupted
from tests.training.test_parity import assert_same_curve

Trained = Callable[..., Artifact]
Losses = Callable[[Artifact], list[float]]
Run = Callable[..., TrainingRun]


def layout(run: TrainingRun, ranks: int, zero_stage: int) -> TrainingRun:
    launcher = replace(run.launcher, num_ranks=ranks)
    return replace(run, launcher=launcher, engine=replace(run.engine, zero_stage=zero_stage))


@pytest.mark.distributed
def test_four_ranks_then_two_then_one_give_one_loss_curve(
    trained: Trained, losses: Losses, tiny_run: Run, data: dict[str, Artifact], tmp_path: Path
) -> None:
    run = tiny_run(micro_batch_size=1, max_steps=60, checkpoint_interval_steps=10, eval_interval_steps=30)
    interrupted(lambda: trained(layout(run, 4, 2)), tmp_path / "store", "step-00000010", rank=2)
    interrupted(lambda: trained(layout(run, 2, 3)), tmp_path / "store", "step-00000030")
    whole = trained(layout(run, 1, 0))
    layouts = whole.metrics["layouts"]
    assert [(step["ranks"], step["zero_stage"]) for step in layouts] == [(4, 2), (2, 3), (1, 0)]
    assert 0 == layouts[0]["from_step"] < 10 <= layouts[1]["from_step"] < 30 <= layouts[2]["from_step"] < 60
    assert len(losses(whole)) == 60
    assert_same_curve(losses(whole), run, data)
