"""An interrupted run carries on and ends with the bits of an uninterrupted one; faults are spoken, nothing is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.config import to_json
from flows.config.engine import EngineConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.training import TrainingRun
from flows.launcher import RankError, launch_ranks
from flows.training.damage_drill import CUTS, FLIPS, DamageJob
from tests.training.interruption import DEADLINE_S, interrupted
from tests.training.preloaded_ranks import running

Trained = Callable[..., Artifact]
Losses = Callable[[Artifact], list[float]]
Run = Callable[..., TrainingRun]


@pytest.fixture
def long_run(tiny_run: Run) -> TrainingRun:
    return tiny_run(max_steps=160, checkpoint_interval_steps=20, eval_interval_steps=40)


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    trained: Trained, losses: Losses, long_run: TrainingRun, tmp_path: Path
) -> None:
    error = interrupted(lambda: trained(long_run), tmp_path / "store", "step-00000040")
    assert "rank 0 was killed by SIGKILL" in str(error)
    assert not running()
    resumed = trained(long_run)
    assert 40 <= resumed.metrics["resumed_from_step"] < 160
    whole = trained(long_run, store="other")
    assert whole.metrics["resumed_from_step"] == 0
    assert losses(resumed) == losses(whole)
    assert resumed.digest == whole.digest
    validation = [event for event in resumed.metrics["curve"] if "validation_loss" in event]
    assert validation == [event for event in whole.metrics["curve"] if "validation_loss" in event]


def test_damaged_checkpoints_are_passed_over(
    trained: Trained, losses: Losses, long_run: TrainingRun, tmp_path: Path
) -> None:
    interrupted(lambda: trained(long_run), tmp_path / "store", "step-00000060")
    checkpoints = next((tmp_path / "store").glob("*.partial/checkpoints"))
    complete = sorted(path.parent for path in checkpoints.glob("step-*/manifest.json"))
    assert len(complete) >= 2  # keep_checkpoints, and perhaps one that was about to go
    newest = max(complete[-1].glob("*.safetensors"), key=lambda path: path.stat().st_size)
    flipped = bytearray(newest.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    newest.write_bytes(flipped)
    cut_short = checkpoints / ".step-00000150.partial"
    cut_short.mkdir()
    (cut_short / "half.safetensors").write_bytes(b"half")
    resumed = trained(long_run)
    assert resumed.metrics["resumed_from_step"] == int(complete[-2].name.removeprefix("step-"))
    log = (resumed.path / "logs" / "rank-0.log").read_text()
    assert f"{newest.name} has changed since it was written" in log
    assert ".step-00000150.partial was cut short" in log
    assert losses(resumed) == losses(trained(long_run, store="other"))


@pytest.mark.distributed
def test_a_dead_rank_ends_the_run_in_seconds_and_leaves_nothing(
    trained: Trained, tiny_run: Run, tmp_path: Path
) -> None:
    run = tiny_run(ranks=2, max_steps=100_000, checkpoint_interval_steps=10, eval_interval_steps=100_000)
    started: list[float] = []

    def train() -> Artifact:
        try:
            return trained(run)
        finally:
            started.append(time.monotonic())

    killed_after = time.monotonic()
    error = interrupted(train, tmp_path / "store", "step-00000010", rank=1)
    assert "rank 1 was killed by SIGKILL" in str(error)
    assert "its last lines" in str(error)
    assert started[0] - killed_after < DEADLINE_S
    assert not running()


def test_a_non_finite_loss_stops_before_the_step_and_keeps_the_checkpoint(
    trained: Trained, tiny_run: Run, tmp_path: Path
) -> None:
    run = tiny_run(
        max_steps=50,
        checkpoint_interval_steps=1,
        warmup_steps=0,
        gradient_clipping=0.0,
        optimizer=OptimizerConfig(name=Optimizer.sgd, learning_rate=1e20),
    )
    with pytest.raises(
        RankError, match=r"the training loss is (nan|inf) at step \d+; the optimizer step was not taken"
    ):
        trained(run)
    assert list((tmp_path / "store").glob("*.partial/checkpoints/step-*/manifest.json"))


def test_early_stopping_keeps_the_best_weights(trained: Trained, tiny_run: Run) -> None:
    run = tiny_run(
        max_steps=200,
        eval_interval_steps=2,
        early_stopping_evals=3,
        warmup_steps=0,
        optimizer=OptimizerConfig(learning_rate=0.5),
    )
    artifact = trained(run)
    validation = [event["validation_loss"] for event in artifact.metrics["curve"] if "validation_loss" in event]
    assert artifact.metrics["stopped_early"]
    assert artifact.metrics["steps"] < 200
    assert artifact.metrics["best_validation_loss"] == min(validation)
    assert validation[-3:] > [min(validation)] * 3


@pytest.mark.distributed
def test_every_damage_to_a_checkpoint_is_passed_over(tiny_run: Run, tmp_path: Path) -> None:
    """Twenty cuts, twenty flipped bits, missing files: the losses afterwards are those of the run without damage."""
    job = DamageJob(run=tiny_run(ranks=2, micro_batch_size=2, engine=EngineConfig(zero_stage=2)), directory=tmp_path)
    (tmp_path / "run.json").write_text(to_json(job))
    launch_ranks("flows.training.damage_drill", tmp_path / "run.json", job.run.launcher, tmp_path / "logs")
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert len(outcomes) == CUTS + FLIPS + 4
    assert set(outcomes.values()) == {"ok"}, outcomes
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert log.count("is damaged") == CUTS + FLIPS + 3
    assert "safetensors has changed since it was written" in log
    assert "manifest.json" in log
    assert ".step-00000003.partial was cut short and is removed" in log
