"""Every way to share work among ranks gives the loss curve of a bare torch loop, and its weights put together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.artifact import Artifact
from flows.config import from_json, to_json
from flows.config.engine import EngineConfig, Offload, Precision
from flows.config.launcher import LauncherConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.training import Objective, TrainingRun
from flows.data.mixture import open_split
from flows.data.packed import IGNORED, PackedDataset
from flows.data.tokenizer import copy_tokenizer
from flows.model.checkpoint import load_decoder, save_decoder
from flows.model.decoder import Decoder, initialize
from flows.training.objectives import Distillation, cross_entropy, scores
from flows.training.receipts import RECEIPTS, verify_lines
from flows.training.schedules import learning_rate
from tests.training.bare_run import unbalance
from tests.training.conftest import SEQUENCE_LENGTH, TINY, VOCAB_SIZE

Trained = Callable[..., Artifact]
Losses = Callable[[Artifact], list[float]]
Run = Callable[..., TrainingRun]
EPS = torch.finfo(torch.float32).eps
UNTIED = {"tie_word_embeddings": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
WIDE = {"num_hidden_layers": 4, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Case:
    """A run that has to give the bare loop's curve."""

    ranks: int
    engine: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = Optimizer.adamw
    distills: bool = False
    documents: bool = False
    averages: bool = False

    def __str__(self) -> str:
        words = [f"{name}={value}".replace("_size", "") for name, value in {**self.engine, **self.model}.items()]
        flags = [name for name in ("distills", "documents", "averages") if getattr(self, name)]
        return " ".join([f"{self.ranks} ranks", *words, *flags])


PIPELINE = {"pipeline_stages": 2, "zero_stage": 1}
TENSOR = {"tensor_parallel_size": 2}
SEQUENCE = {"sequence_parallel_size": 2}
ON_CPU = {"offload_optimizer": Offload.cpu}
ALL_ON_CPU = {**ON_CPU, "offload_parameters": Offload.cpu, "zero_stage": 3}
RECOMPUTE = {"activation_checkpointing": True}
BF16 = {"precision": Precision.bf16}
FP8 = {"precision": Precision.fp8, "zero_stage": 1}
CASES = [
    Case(1, {"zero_stage": 0}),
    *[Case(2, {"zero_stage": stage}) for stage in (0, 1, 2, 3)],
    Case(2, {"zero_stage": 3}, distills=True),
    Case(2, ALL_ON_CPU),
    Case(2, {**RECOMPUTE, "zero_stage": 1}),
    Case(2, {**BF16, "zero_stage": 2}),
    Case(2, PIPELINE, documents=True),
    Case(2, {**TENSOR, "zero_stage": 1}),
    Case(2, {**SEQUENCE, "zero_stage": 1}, documents=True),
    Case(2, {"expert_parallel_size": 2}, EXPERTS, distills=True),
    Case(4, {**PIPELINE, **SEQUENCE}, documents=True),
]
"""One of each kind."""
MORE_CASES = [
    Case(1, distills=True),
    *[Case(2, {"zero_stage": stage, **ON_CPU}) for stage in (1, 2, 3)],
    Case(2, {**RECOMPUTE, "zero_stage": 3}),
    Case(2, {**BF16, "zero_stage": 1}),
    Case(2, {**BF16, "zero_stage": 3}),
    Case(2, PIPELINE),
    Case(2, PIPELINE, UNTIED),
    Case(2, {**PIPELINE, **RECOMPUTE}),
    Case(2, {**PIPELINE, **BF16}),
    Case(2, PIPELINE, distills=True),
    Case(2, PIPELINE, averages=True),
    *[Case(2, {**TENSOR, "zero_stage": stage}) for stage in (0, 2, 3)],
    Case(2, {**TENSOR, **RECOMPUTE}),
    Case(2, {**TENSOR, **BF16}),
    Case(2, TENSOR, distills=True),
    Case(2, TENSOR, documents=True),
    Case(2, TENSOR, averages=True),
    *[Case(2, {**SEQUENCE, "zero_stage": stage}) for stage in (0, 2, 3)],
    Case(2, {**SEQUENCE, **RECOMPUTE}),
    Case(2, {**SEQUENCE, **BF16}),
    Case(2, SEQUENCE, distills=True),
    Case(1, {"zero_stage": 1, "compile": True}),
    Case(2, {"zero_stage": 3, "compile": True}),
    Case(2, {**PIPELINE, "compile": True}),
    Case(2, {**TENSOR, "compile": True}),
    Case(2, {**SEQUENCE, "compile": True}, documents=True),
    Case(2, {**RECOMPUTE, "compile": True}),
    Case(2, {**PIPELINE, **RECOMPUTE, "compile": True}),
    Case(1, FP8),
    Case(1, FP8, distills=True),
    *[Case(2, {**FP8, "zero_stage": stage, **RECOMPUTE}) for stage in (2, 3)],
    Case(2, {**FP8, **PIPELINE}, documents=True),
    Case(2, {**FP8, **SEQUENCE}, documents=True),
    Case(1, {"zero_stage": 1}, EXPERTS),
    *[Case(2, {"zero_stage": stage, "expert_parallel_size": 1}, EXPERTS) for stage in (0, 1, 2)],
    *[Case(2, {"zero_stage": stage, "expert_parallel_size": 2}, EXPERTS) for stage in (1, 2)],
    Case(2, {"expert_parallel_size": 2, **RECOMPUTE}, {**EXPERTS, "num_experts_per_tok": 3}),
    Case(2, {"expert_parallel_size": 2, **BF16}, EXPERTS),
    Case(2, {"expert_parallel_size": 2, **ON_CPU, "zero_stage": 2}, EXPERTS),
    Case(4, {"expert_parallel_size": 2}, EXPERTS, optimizer=Optimizer.sgd),
    Case(4, {"zero_stage": 3}),
    Case(4, PIPELINE),
    Case(4, {**PIPELINE, "pipeline_stages": 4}, WIDE),
    Case(4, {**TENSOR, "zero_stage": 2}),
    Case(4, {**SEQUENCE, "zero_stage": 3}),
    Case(4, {**TENSOR, **SEQUENCE}, WIDE),
    Case(4, {**TENSOR, "tensor_parallel_size": 4}, WIDE),
]


@pytest.fixture(scope="session")
def teacher(data: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An untrained model; that it knows nothing does not matter to the arithmetic."""
    directory = tmp_path_factory.mktemp("teacher")
    model = Decoder(TINY, VOCAB_SIZE)
    initialize(model, seed=1)
    save_decoder(directory, dict(model.named_parameters()), TINY, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
    copy_tokenizer(data["tokenizer"].path, directory)
    return Artifact("base", "base", "base", directory)


def run_of(case: Case, tiny_run: Run) -> TrainingRun:
    engine = EngineConfig(**case.engine)
    run = tiny_run(
        ranks=case.ranks,
        micro_batch_size=4 * engine.ranks_per_replica // case.ranks,  # two micro steps
        engine=engine,
        model=replace(TINY, **case.model),
        optimizer=OptimizerConfig(name=case.optimizer, learning_rate=0.1 if case.optimizer == "sgd" else 1e-2),
        max_steps=20,
        eval_interval_steps=20,
        checkpoint_interval_steps=20,
        ema_decay=0.9 if case.averages else 0.0,
        **({"objective": Objective.distillation, "temperature": 2.0, "alpha": 0.7} if case.distills else {}),
    )
    if engine.compile:  # no sign of life meanwhile: minutes on a machine that is busy with other work
        run = replace(run, launcher=replace(run.launcher, stall_timeout_s=1200))
    return replace(run, document_masks=case.documents)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in MORE_CASES)], ids=str
)
def test_the_loss_curve_and_the_weights_are_those_of_a_bare_loop(
    case: Case,
    trained: Trained,
    losses: Losses,
    tiny_run: Run,
    data: dict[str, Artifact],
    teacher: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of(case, tiny_run)
    shared = tmp_path / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared))
    artifact = trained(run, **({"teacher": teacher} if case.distills else {}))
    used = teacher if case.distills else None
    if run.engine.precision != Precision.fp32:
        truth = bare_losses(run, data, torch.float64, used)
        # bf16 keeps 8 bits: some 20 roundings on the way to the loss cost 2^-9 each at most, and partly cancel. fp8
        # keeps 4, of operands alone: in a product of 32 terms or more their errors cancel better.
        assert max(abs(a - b) / b for a, b in zip(losses(artifact), truth, strict=True)) <= 20**0.5 * 2**-9
    else:
        assert_same_curve(losses(artifact), run, data, used)
    assert all(event["grad_norm"] > 0 for event in artifact.metrics["curve"] if "train_loss" in event)
    assert not list(shared.rglob("*.so")), "a killed rank would leave half a library to others"
    assert_stream_is_proven(artifact, run, data)
    assert_saved_weights_are_the_measured_ones(artifact, run, data)


@pytest.mark.exhaustive
def test_fp8_is_not_bf16(trained: Trained, losses: Losses, tiny_run: Run) -> None:
    run = run_of(Case(1, FP8), tiny_run)
    wider = replace(run, engine=replace(run.engine, precision=Precision.bf16))
    assert losses(trained(run)) != losses(trained(wider))


def assert_saved_weights_are_the_measured_ones(artifact: Artifact, run: TrainingRun, data: dict[str, Artifact]) -> None:
    """The saved model has, in one process, the validation loss that the ranks measured together."""
    model = load_decoder(artifact.path)
    dataset = open_split(data["tokens"].path, "validation", SEQUENCE_LENGTH, run.document_masks, {})
    rows = [dataset.row(int(index)) for index in dataset.first(run.train.eval_tokens // SEQUENCE_LENGTH)]
    inputs, targets, documents = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    with torch.no_grad():
        logits = scores(model, inputs, documents if run.document_masks else None)
    whole = cross_entropy(logits, inputs, targets).item() / (targets != IGNORED).sum().item()
    rounding = 20**0.5 * 2**-9 if run.engine.precision != Precision.fp32 else 32 * EPS
    assert abs(artifact.metrics["best_validation_loss"] - whole) <= rounding * whole


def assert_stream_is_proven(artifact: Artifact, run: TrainingRun, data: dict[str, Artifact]) -> None:
    lines = [json.loads(line) for line in (artifact.path / "logs" / RECEIPTS).read_text().splitlines()]
    dataset = PackedDataset(data["tokens"].path, "train", run.sequence_length)
    proof = verify_lines(lines, dataset, run, data["tokens"].digest, run.train.max_steps)
    assert proof.link == artifact.metrics["receipt"]
    if not run.document_masks:
        assert artifact.metrics["loss_tokens"] == proof.samples * run.sequence_length


def assert_same_curve(
    got: list[float], run: TrainingRun, data: dict[str, Artifact], teacher: Artifact | None = None
) -> None:
    """Within four times what float32 itself costs the bare loop against float64, plus rounding of the loss."""
    truth = bare_losses(run, data, torch.float64, teacher)
    plain = bare_losses(run, data, torch.float32, teacher)
    noise = max(abs(a - b) for a, b in zip(plain, truth, strict=True))
    worst = max(abs(a - b) for a, b in zip(got, truth, strict=True))
    assert worst <= 4 * noise + 4 * EPS * max(truth), f"{worst} against noise {noise}"
    assert truth[-1] < truth[0]


def bare_losses(
    run: TrainingRun, data: dict[str, Artifact], dtype: torch.dtype, teacher: Artifact | None = None
) -> list[float]:
    """The same run without an engine: one process, no accumulation."""
    train = run.train if run.model.num_experts else replace(run.train, micro_batch_size=1)
    train = replace(train, eval_interval_steps=1, checkpoint_interval_steps=1, ema_decay=0.0)  # of no consequence
    described = replace(run, engine=EngineConfig(), launcher=LauncherConfig(), train=train)
    return _bare_losses(to_json(described), data["tokens"].path, teacher.path if teacher else None, dtype)


@cache
def _bare_losses(described: str, tokens_dir: Path, teacher_dir: Path | None, dtype: torch.dtype) -> list[float]:
    torch.set_num_threads(1)  # too small to share
    run = from_json(TrainingRun, described)
    model = Decoder(run.model, VOCAB_SIZE)
    initialize(model, run.seed)
    model = model.to(dtype)
    loss_fn = (
        Distillation(load_decoder(teacher_dir).to(dtype), run.temperature, run.alpha) if teacher_dir else cross_entropy
    )
    dataset = open_split(tokens_dir, "train", run.sequence_length, run.document_masks, {})
    config, size = run.train.optimizer, run.train.global_batch_size
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.name == Optimizer.sgd:
        update: torch.optim.Optimizer = torch.optim.SGD(groups, 0.0, momentum=config.momentum)
    else:
        update = torch.optim.AdamW(groups, 0.0, (config.beta1, config.beta2), config.eps)
    routers = [layer.block_sparse_moe.gate for layer in model.model.layers] if run.model.num_experts else []
    losses, norms = [], []
    for step in range(run.train.max_steps):
        rows = [dataset.row(int(index)) for index in dataset.order(step * size, size, run.seed)]
        counted = sum(int((row.targets_L != IGNORED).sum()) for row in rows)
        update.zero_grad()
        total = 0.0
        # How experts are balanced is a matter of each micro batch; the rest does not depend on how rows are cut.
        cut = run.train.micro_batch_size if run.model.num_experts else size
        for first in range(0, size, cut):
            part = zip(*rows[first : first + cut], strict=True)
            inputs, targets, documents = (torch.from_numpy(np.stack(values)) for values in part)
            gates: list[torch.Tensor] = []
            hooks = [gate.register_forward_hook(lambda _, x, y, gates=gates: gates.append(y)) for gate in routers]
            known = documents if run.document_masks else None
            sums = loss_fn(scores(model, inputs, known), inputs, targets, known)
            loss = sums / counted + unbalance(gates, run.model) * cut / size
            for hook in hooks:
                hook.remove()
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.gradient_clipping))
        for group in update.param_groups:
            group["lr"] = learning_rate(run.train, step)
        update.step()
        losses.append(total)
    assert max(norms) > 1.5 * run.train.gradient_clipping, "the clip value has to bind, or a wrong norm does not show"
    return losses
