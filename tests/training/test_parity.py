"""Every engine gives the loss curve of a bare torch loop on the same batches."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from flows.artifact import Artifact
from flows.config.engine import EngineConfig, Precision
from flows.config.training import Objective, TrainingRun
from flows.data.packed import PackedDataset, sample_order
from flows.model.checkpoint import load_decoder
from flows.model.decoder import Decoder, initialize
from flows.training.objectives import cross_entropy, distillation
from flows.training.receipts import RECEIPTS, verify_lines
from flows.training.schedules import learning_rate

VOCAB_SIZE = 64
Trained = Callable[..., Artifact]
Losses = Callable[[Artifact], list[float]]
Run = Callable[..., TrainingRun]


def bare_losses(
    run: TrainingRun, data: dict[str, Artifact], dtype: torch.dtype, teacher: Artifact | None = None
) -> list[float]:
    """The same run without an engine: one process, whole batches, no accumulation."""
    model = Decoder(run.model, VOCAB_SIZE)
    initialize(model, run.seed)
    model = model.to(dtype)
    loss_fn = (
        distillation(load_decoder(teacher.path).to(dtype), run.temperature, run.alpha) if teacher else cross_entropy
    )
    dataset = PackedDataset(data["tokens"].path, "train", run.sequence_length)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    config = run.train.optimizer
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 0.0, (config.beta1, config.beta2), config.eps)
    losses = []
    size = run.train.global_batch_size
    for step in range(run.train.max_steps):
        batch = [dataset[int(i)] for i in sample_order(len(dataset), step * size, size, run.seed)]
        tokens = torch.from_numpy(np.stack(batch))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = model(inputs)
        loss = loss_fn(logits, inputs, targets) / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.train, step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_curve(
    got: list[float], run: TrainingRun, data: dict[str, Artifact], teacher: Artifact | None = None
) -> None:
    """Within four times what float32 itself costs the bare loop against float64, plus rounding of the loss."""
    truth = bare_losses(run, data, torch.float64, teacher)
    plain = bare_losses(run, data, torch.float32, teacher)
    noise = max(abs(a - b) for a, b in zip(plain, truth, strict=True))
    worst = max(abs(a - b) for a, b in zip(got, truth, strict=True))
    assert worst <= 4 * noise + 4 * torch.finfo(torch.float32).eps * max(truth), f"{worst} against noise {noise}"
    assert truth[-1] < truth[0]


def assert_stream_is_proven(artifact: Artifact, run: TrainingRun, data: dict[str, Artifact]) -> None:
    lines = [json.loads(line) for line in (artifact.path / "logs" / RECEIPTS).read_text().splitlines()]
    dataset = PackedDataset(data["tokens"].path, "train", run.sequence_length)
    proof = verify_lines(lines, dataset, run, data["tokens"].digest, run.train.max_steps)
    assert proof.link == artifact.metrics["receipt"]
    assert artifact.metrics["loss_tokens"] == proof.samples * run.sequence_length


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_give_the_loss_curve_of_one_process(
    zero_stage: int, trained: Trained, losses: Losses, tiny_run: Run, data: dict[str, Artifact]
) -> None:
    run = tiny_run(ranks=2, micro_batch_size=2, engine=EngineConfig(zero_stage=zero_stage))  # and accumulates twice
    artifact = trained(run)
    assert_same_curve(losses(artifact), run, data)
    assert_stream_is_proven(artifact, run, data)


def test_distillation_runs_on_the_same_loop(
    trained: Trained, losses: Losses, tiny_run: Run, data: dict[str, Artifact]
) -> None:
    teacher = trained(tiny_run(max_steps=20))
    run = tiny_run(objective=Objective.distillation, temperature=2.0, alpha=0.7)
    student = trained(run, teacher=teacher)
    assert_same_curve(losses(student), run, data, teacher)


@pytest.mark.distributed
def test_bf16_trains_close_to_fp32(trained: Trained, losses: Losses, tiny_run: Run, data: dict[str, Artifact]) -> None:
    run = tiny_run(ranks=2, engine=EngineConfig(precision=Precision.bf16, zero_stage=2))
    truth = bare_losses(run, data, torch.float64)
    got = losses(trained(run))
    # bf16 keeps 8 bits: each of some 20 roundings on the way to the loss costs 2^-9 at most, and they partly cancel.
    assert max(abs(a - b) / b for a, b in zip(got, truth, strict=True)) <= 20**0.5 * 2**-9
