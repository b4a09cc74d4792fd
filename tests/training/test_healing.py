"""A student that goes on from another candidate: its weights, its shape, and its zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.compression.prune_weights import prune_weights_
from flows.config.engine import EngineConfig, Precision
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.prune import PruneConfig
from flows.config.training import Objective, TrainingRun
from flows.data.tokenizer import copy_tokenizer
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize
from tests.training.conftest import SEQUENCE_LENGTH, TINY, VOCAB_SIZE


@pytest.fixture
def sparse(tmp_path: Path, data: dict[str, Artifact]) -> Artifact:
    """A decoder of which half of each layer's weights are zero, as a candidate."""
    model = Decoder(TINY, VOCAB_SIZE).requires_grad_(False)
    initialize(model, seed=5)
    prune_weights_(model, PruneConfig(sparsity=0.5), {})
    save_decoder(tmp_path / "sparse", model.state_dict(), TINY, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
    copy_tokenizer(data["tokenizer"].path, tmp_path / "sparse")
    return Artifact("sparse", "sparse", "sparse", tmp_path / "sparse")


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.path / "model.safetensors")


def healing(run: TrainingRun, keep_zeros: bool = True) -> TrainingRun:
    return replace(run, objective=Objective.distillation, alpha=0.5, start="sparse", keep_zeros=keep_zeros)


def test_training_starts_from_the_candidate_and_learns(
    trained: Callable[..., Artifact],
    tiny_run: Callable[..., TrainingRun],
    losses: Callable[[Artifact], list[float]],
    sparse: Artifact,
) -> None:
    still = tiny_run(max_steps=1, optimizer=OptimizerConfig(learning_rate=1e-12, weight_decay=0.0))
    same = trained(healing(still, keep_zeros=False), teacher=sparse, start=sparse)
    for name, tensor in weights(same).items():
        torch.testing.assert_close(tensor, weights(sparse)[name], rtol=0, atol=1e-9)
    assert losses(same)[0] < losses(trained(replace(still, objective=Objective.cross_entropy)))[0]  # half is a KL of 0
    moved = weights(trained(healing(tiny_run(), keep_zeros=False), teacher=sparse, start=sparse))
    assert (moved["model.layers.0.mlp.up_proj.weight"] == 0).double().mean() < 0.01


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.exhaustive), 1, pytest.param(2, marks=pytest.mark.exhaustive), 3]
)
def test_zeros_stay_zeros_and_the_rest_is_trained(
    trained: Callable[..., Artifact], tiny_run: Callable[..., TrainingRun], sparse: Artifact, stage: int
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    run = tiny_run(
        engine=EngineConfig(zero_stage=stage), optimizer=optimizer, ranks=2 if stage > 1 else 1, ema_decay=0.5
    )
    after = weights(trained(healing(run), teacher=sparse, start=sparse))
    for name, before in weights(sparse).items():
        zeros = before == 0
        assert (after[name][zeros] == 0).all(), name
        assert (after[name][~zeros] != before[~zeros]).double().mean() > 0.9, name


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [Optimizer.adam, Optimizer.lion, Optimizer.sgd, Optimizer.rmsprop])
def test_every_update_rule_that_is_accepted_keeps_zeros(
    trained: Callable[..., Artifact], tiny_run: Callable[..., TrainingRun], sparse: Artifact, name: Optimizer
) -> None:
    optimizer = OptimizerConfig(name=name, learning_rate=1e-3, weight_decay=0.1)
    run = tiny_run(engine=EngineConfig(zero_stage=1, precision=Precision.bf16), optimizer=optimizer)
    after = weights(trained(healing(run), teacher=sparse, start=sparse))
    assert all((after[name][before == 0] == 0).all() for name, before in weights(sparse).items())


def test_another_start_is_another_artifact(
    tmp_path: Path, data: dict[str, Artifact], tiny_run: Callable[..., TrainingRun], sparse: Artifact
) -> None:
    store, run = ArtifactStore(tmp_path / "store"), healing(tiny_run())
    other = replace(sparse, digest="other")
    keys = {
        store.key(Stage("healed", "flows.training.stage", run, {**data, "teacher": sparse, "start": start}))
        for start in (sparse, other)
    }
    assert len(keys) == 2
