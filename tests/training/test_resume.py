"""An interrupted run carries on and ends with the bits of an uninterrupted one; faults are spoken, nothing is lost."""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.config import to_json
from flows.config.engine import EngineConfig
from flows.config.launcher import LauncherConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.training import TrainingRun
from flows.launcher import RankError, launch_ranks
from flows.training.damage_drill import CUTS, FLIPS, DamageJob
from tests.training.interruption import DEADLINE_S, interrupted, kill
from tests.training.preloaded_ranks import running

Trained = Callable[..., Artifact]
Losses = Callable[[Artifact], list[float]]
Run = Callable[..., TrainingRun]


@pytest.fixture
def long_run(tiny_run: Run) -> TrainingRun:
    return tiny_run(max_steps=160, checkpoint_interval_steps=20, eval_interval_steps=40)


def test_killed_in_a_save_then_out_of_disk_then_resumed_equals_uninterrupted_bit_for_bit(
    trained: Trained, losses: Losses, long_run: TrainingRun, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    error = interrupted(lambda: trained(long_run), store, "*step-0000004*")  # as soon as it is begun
    assert "rank 0 was killed by SIGKILL" in str(error)

    (checkpoints,) = store.glob("*.partial/checkpoints")
    written = next(checkpoints.glob("step-*/*.safetensors")).stat().st_size

    def fill_disk() -> None:  # for the ranks: no file may grow beyond half of what a checkpoint needs
        for rank in running():
            resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (written // 2, written // 2))

    error = interrupted(lambda: trained(long_run), store, "step-0000008*", fill_disk)
    assert re.search(
        r"checkpoint .*/step-\d+ could not be written \(rank 0: .*File too large.*\)\. It takes 0\.\d MB and "
        r"\d+\.\d MB are free there\. Earlier checkpoints are intact: step-\d+, step-\d+\. Make room",
        str(error),
    )
    assert not list(checkpoints.glob(".*"))
    left = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))

    resumed = trained(long_run)
    assert resumed.metrics["resumed_from_step"] == left >= 80
    whole = trained(long_run, store="other")
    assert whole.metrics["resumed_from_step"] == 0
    assert losses(resumed) == losses(whole)
    assert resumed.digest == whole.digest
    assert resumed.metrics["receipt"] == whole.metrics["receipt"]
    receipts = [(artifact.path / "logs" / "receipts.jsonl").read_text() for artifact in (resumed, whole)]
    assert receipts[0] == receipts[1]
    assert len(receipts[0].splitlines()) == 160
    validation = [event for event in resumed.metrics["curve"] if "validation_loss" in event]
    assert validation == [event for event in whole.metrics["curve"] if "validation_loss" in event]


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
    error = interrupted(train, tmp_path / "store", "step-00000010", lambda: kill(1))
    assert "rank 1 was killed by SIGKILL" in str(error)
    assert "its last lines" in str(error)
    assert started[0] - killed_after < DEADLINE_S
    assert not running()


def test_every_kth_checkpoint_stays(trained: Trained, tiny_run: Run, tmp_path: Path) -> None:
    run = tiny_run(max_steps=100_000, checkpoint_interval_steps=2, keep_every_steps=6, eval_interval_steps=100_000)
    interrupted(lambda: trained(run), tmp_path / "store", "step-00000020")
    left = [int(path.name.removeprefix("step-")) for path in tmp_path.glob("store/*/checkpoints/step-*")]
    assert {6, 12, 18, 20} <= set(left)
    assert not {2, 4, 8, 10, 14} & set(left)


def test_a_non_finite_loss_stops_before_the_step_and_keeps_the_checkpoint(
    trained: Trained, tiny_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(
        launcher=LauncherConfig(threads_per_rank=1, max_restarts=2),
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
    assert "restart" not in caplog.text  # of restarts: it would come again


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
