"""Zeros that grow while the rest learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flows.artifact import Artifact
from flows.config import Config, ConfigError
from flows.config.engine import EngineConfig, Precision
from flows.config.lora import LoraConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.sparsify import SparsifyConfig
from flows.config.steps import StepConfig
from flows.config.training import TrainConfig, TrainingRun
from flows.training.growing_sparsity import has_all_zeros, is_due, share_of_zeros
from tests.training.interruption import interrupted

GROWING = SparsifyConfig(sparsity=0.5, begin_step=2, end_step=8, interval_steps=2)


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.path / "model.safetensors")


def zeros(artifact: Artifact) -> dict[str, float]:
    """Share of zeros in each matrix."""
    return {name: float((one == 0).double().mean()) for name, one in weights(artifact).items() if one.dim() == 2}


def test_the_share_rises_as_published() -> None:
    config = SparsifyConfig(sparsity=0.8, begin_step=10, end_step=110, interval_steps=20)
    due = [step for step in range(200) if is_due(config, step)]
    assert due == [30, 50, 70, 90, 110]
    # equation 1 of arXiv:1710.01878 with s_i = 0, s_f = 0.8, n = 5, spelt out
    assert [share_of_zeros(config, step) for step in due] == pytest.approx(
        [0.8 + (0 - 0.8) * (1 - k / 5) ** 3 for k in range(1, 6)]
    )
    assert share_of_zeros(config, 110) == 0.8
    assert (has_all_zeros(config, 109), has_all_zeros(config, 110)) == (False, True)
    assert not any(is_due(SparsifyConfig(), step) for step in range(300))


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.exhaustive), 1, pytest.param(2, marks=pytest.mark.exhaustive), 3]
)
def test_the_smallest_weights_become_zero_and_stay_so(
    trained: Callable[..., Artifact], tiny_run: Callable[..., TrainingRun], stage: int
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    run = tiny_run(
        engine=EngineConfig(zero_stage=stage),
        ranks=2 if stage > 1 else 1,
        optimizer=optimizer,
        sparsify=GROWING,
        eval_interval_steps=3,
    )
    found = zeros(trained(run))
    assert found.pop("model.embed_tokens.weight") == 0
    assert found == dict.fromkeys(found, 0.5)
    assert len(found) == 14


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [Optimizer.adam, Optimizer.lion, Optimizer.sgd, Optimizer.rmsprop])
def test_every_update_rule_that_is_accepted_leaves_zeros_alone(
    trained: Callable[..., Artifact], tiny_run: Callable[..., TrainingRun], name: Optimizer
) -> None:
    optimizer = OptimizerConfig(name=name, learning_rate=1e-3, weight_decay=0.1)
    engine = EngineConfig(zero_stage=1, precision=Precision.bf16)
    found = zeros(trained(tiny_run(engine=engine, optimizer=optimizer, sparsify=GROWING, ema_decay=0.5)))
    assert set(found.values()) == {0.0, 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"train.sparsify.sparsity=1.0 must be 0 or more and below 1"),
        (
            {"sparsity": 0.5, "interval_steps": 7},
            r"train.sparsify.end_step=200 must lie a multiple of .*=7 steps after",
        ),
        ({"sparsity": 0.5, "begin_step": 200}, r"train.sparsify.end_step=200 must lie a multiple"),
    ],
)
def test_schedules_that_cannot_be_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparsifyConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 7}, r"train.sparsify.end_step=8 must not exceed train.max_steps=7"),
        (
            {"lora": LoraConfig(rank=2)},
            r"train.lora.rank=2 cannot be combined with train.sparsify.sparsity=0.5: its zer",
        ),
        ({"optimizer": OptimizerConfig(name=Optimizer.muon)}, r"train.optimizer.name=muon cannot be combined"),
        (
            {"engine": EngineConfig(zero_stage=1, tensor_parallel_size=2), "ranks": 2},
            r"engine.tensor_parallel_size=2 cannot be combined with train.sparsify.sparsity=0.5",
        ),
    ],
)
def test_what_would_not_keep_zeros_is_refused(
    tiny_run: Callable[..., TrainingRun], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(**({"sparsify": GROWING} | changes))


def test_the_gates_know_who_is_sparse() -> None:
    train = {"max_steps": 8, "sparsify": {"sparsity": 0.5, "begin_step": 2, "end_step": 8, "interval_steps": 2}}
    steps = {
        "sparse": StepConfig(distill="base", start="base", settings={"train": train}),
        "healed": StepConfig(distill="base", start="sparse"),
        "student": StepConfig(distill="base"),
    }
    assert Config(steps=steps).sparse_candidates() == {"sparse": "0.5", "healed": "0.5"}
    base = Config(train=TrainConfig(sparsify=replace(GROWING, sparsity=0.25)))
    assert base.gating().sparse == {"base": "0.25"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [1, 3])
def test_an_interrupted_run_goes_on_bit_for_bit(
    trained: Callable[..., Artifact], tiny_run: Callable[..., TrainingRun], tmp_path: Path, stage: int
) -> None:
    growing = SparsifyConfig(sparsity=0.5, begin_step=20, end_step=120, interval_steps=10)
    run = tiny_run(
        engine=EngineConfig(zero_stage=stage),
        sparsify=growing,
        max_steps=160,
        checkpoint_interval_steps=15,
        eval_interval_steps=40,
    )
    interrupted(lambda: trained(run), tmp_path / "store", "step-00000060")
    resumed, whole = trained(run), trained(run, store="other")
    assert resumed.metrics["resumed_from_step"] >= 60
    assert resumed.digest == whole.digest
