"""Every way to share work among ranks gives the loss curve of a bare torch loop, and weights that can be put together.

All cases run in one start of ranks (rank_cases.py); the tests here read what they left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.artifact import Artifact
from flows.config import to_plain
from flows.config.engine import EngineConfig, Offload, Precision
from flows.config.model import ModelConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.training import Objective, TrainingRun
from flows.data.packed import PackedDataset, sample_order
from flows.model.checkpoint import load_decoder, save_decoder
from flows.model.decoder import Decoder, initialize
from flows.training.job import TrainingJob
from flows.training.metrics_log import METRICS, read_metrics
from flows.training.objectives import cross_entropy, distillation
from flows.training.schedules import learning_rate

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE, SEQUENCE_LENGTH = 64, 16
EPS = torch.finfo(torch.float32).eps
ADAMW = OptimizerConfig(learning_rate=1e-2)
UNTIED = {"tie_word_embeddings": False}
TINY = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
WIDE = {"num_hidden_layers": 4, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Case:
    """A run that has to give the bare loop's curve."""

    ranks: int
    engine: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerConfig = ADAMW
    distills: bool = False

    def __str__(self) -> str:
        words = [f"{name}={value}".replace("_size", "") for name, value in {**self.engine, **self.model}.items()]
        return " ".join([f"{self.ranks} ranks", self.optimizer.name, *words, *(["distills"] if self.distills else [])])


def optimizer(name: Optimizer, learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(name=name, learning_rate=learning_rate, weight_decay=0.01, momentum=0.5)


PIPELINE = {"pipeline_stages": 2, "zero_stage": 1}
TENSOR = {"tensor_parallel_size": 2}
SEQUENCE = {"sequence_parallel_size": 2}
ON_CPU = {"offload_optimizer": Offload.cpu}
ALL_ON_CPU = {**ON_CPU, "offload_parameters": Offload.cpu, "zero_stage": 3}
RECOMPUTE = {"activation_checkpointing": True}
BF16 = {"precision": Precision.bf16}
CASES = [
    Case(1, {"zero_stage": 0}),
    Case(1, optimizer=optimizer(Optimizer.adam, 1e-3)),
    Case(1, optimizer=optimizer(Optimizer.sgd, 0.1)),
    Case(1, optimizer=optimizer(Optimizer.rmsprop, 1e-3)),
    Case(1, distills=True),
    *[Case(2, {"zero_stage": stage}) for stage in (0, 1, 2, 3)],
    *[Case(2, {"zero_stage": stage, **ON_CPU}) for stage in (1, 2, 3)],
    Case(2, ALL_ON_CPU),
    *[Case(2, {"zero_stage": stage, **RECOMPUTE}) for stage in (1, 3)],
    Case(2, {**BF16, "zero_stage": 1}),
    Case(2, {**BF16, "zero_stage": 2}),
    Case(2, {**BF16, "zero_stage": 3}),
    Case(2, PIPELINE),
    Case(2, PIPELINE, UNTIED),
    Case(2, {**PIPELINE, **RECOMPUTE}),
    Case(2, {**PIPELINE, **BF16}),
    Case(2, PIPELINE, distills=True),
    *[Case(2, {**TENSOR, "zero_stage": stage}) for stage in (0, 1, 2, 3)],
    Case(2, {**TENSOR, **RECOMPUTE}),
    Case(2, {**TENSOR, **BF16}),
    Case(2, TENSOR, distills=True),
    *[Case(2, {**SEQUENCE, "zero_stage": stage}) for stage in (0, 1, 2, 3)],
    Case(2, {**SEQUENCE, **RECOMPUTE}),
    Case(2, {**SEQUENCE, **BF16}),
    Case(2, SEQUENCE, distills=True),
    Case(1, {"zero_stage": 1}, EXPERTS),
    *[Case(2, {"zero_stage": stage, "expert_parallel_size": 1}, EXPERTS) for stage in (0, 1, 2)],
    *[Case(2, {"zero_stage": stage, "expert_parallel_size": 2}, EXPERTS) for stage in (1, 2)],
    Case(2, {"expert_parallel_size": 2, **RECOMPUTE}, {**EXPERTS, "num_experts_per_tok": 3}),
    Case(2, {"expert_parallel_size": 2, **BF16}, EXPERTS),
    Case(2, {"expert_parallel_size": 2}, EXPERTS, distills=True),
    Case(4, {"expert_parallel_size": 2}, EXPERTS, optimizer=optimizer(Optimizer.sgd, 0.1)),
    Case(4, {"zero_stage": 3}),
    Case(4, PIPELINE),
    Case(4, {**PIPELINE, "pipeline_stages": 4}, WIDE),
    Case(4, {**TENSOR, "zero_stage": 2}),
    Case(4, {**SEQUENCE, "zero_stage": 3}),
    Case(4, {**PIPELINE, **SEQUENCE}),
    Case(4, {**TENSOR, **SEQUENCE}, WIDE),
    Case(4, {**TENSOR, "tensor_parallel_size": 4}, WIDE),
]
NAMED = {f"{number:02d} {case}": case for number, case in enumerate(CASES)}


@pytest.fixture(scope="session")
def teacher(data: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model; that it knows nothing does not matter to the arithmetic."""
    directory = tmp_path_factory.mktemp("teacher")
    model = Decoder(TINY, VOCAB_SIZE)
    initialize(model, seed=1)
    save_decoder(directory, dict(model.named_parameters()), TINY, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
    return directory


def make_jobs(
    directory: Path, tokens_dir: Path, teacher_dir: Path, tiny_run: Callable[..., TrainingRun]
) -> dict[str, TrainingJob]:
    jobs = {}
    for name, case in NAMED.items():
        engine = EngineConfig(**case.engine)
        run = tiny_run(
            ranks=case.ranks,
            micro_batch_size=4 * engine.ranks_per_replica // case.ranks,  # two micro steps
            engine=engine,
            optimizer=case.optimizer,
            model=replace(TINY, **case.model),
            max_steps=20,
            eval_interval_steps=20,
            checkpoint_interval_steps=20,
            **({"objective": Objective.distillation, "temperature": 2.0, "alpha": 0.7} if case.distills else {}),
        )
        jobs[name] = TrainingJob(
            run=run,
            directory=directory / name.replace(" ", "_"),
            tokens_dir=tokens_dir,
            tokenizer_dir=tokens_dir,
            teacher_dir=teacher_dir if case.distills else None,
        )
    return jobs


@pytest.fixture(scope="session")
def jobs(
    data: dict[str, Artifact],
    teacher: Path,
    session_tiny_run: Callable[..., TrainingRun],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, TrainingJob]:
    """Each case as a rank is told, with its logs and its weights after all of them have run."""
    directory = tmp_path_factory.mktemp("cases")
    jobs = make_jobs(directory, data["tokens"].path, teacher, session_tiny_run)
    (directory / "cases.json").write_text(json.dumps({name: to_plain(job) for name, job in jobs.items()}))
    program = Path(__file__).with_name("rank_cases.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(program), str(directory)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return jobs


def losses(job: TrainingJob) -> list[float]:
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(job.log_dir.glob("rank-*.log")))
    curve = [event["train_loss"] for event in read_metrics(job.log_dir / METRICS) if "train_loss" in event]
    assert len(curve) == job.run.train.max_steps, logs
    return curve


def unbalance(gates: list[torch.Tensor], config: ModelConfig) -> torch.Tensor | float:
    """GShard's balance loss (arXiv:2006.16668) of each layer's scores [B, L, E], weighted; DeepSpeed counts the first
    choice if there are two, else each."""
    total: torch.Tensor | float = 0.0
    for scores in gates:
        probabilities = scores.flatten(0, 1).softmax(-1)
        counted = 1 if config.num_experts_per_tok == 2 else config.num_experts_per_tok
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(counted, dim=1).indices, 1.0 / counted)
        total = total + config.num_experts * (probabilities.mean(0) * chosen.mean(0)).sum()
    return config.router_aux_loss_coef * total


@cache
def bare_losses(
    model_config: ModelConfig,
    settings: OptimizerConfig,
    tokens_dir: Path,
    teacher_dir: Path | None,
    dtype: torch.dtype,
    run: Any,
) -> list[float]:
    """The run without an engine: one process, whole batches, no accumulation."""
    torch.set_num_threads(1)  # too small to share
    model = Decoder(model_config, VOCAB_SIZE)
    initialize(model, 0)
    model = model.to(dtype)
    loss_fn = distillation(load_decoder(teacher_dir).to(dtype), 2.0, 0.7) if teacher_dir else cross_entropy
    dataset = PackedDataset(tokens_dir, "train", SEQUENCE_LENGTH)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    updates: dict[Optimizer, Callable[[], torch.optim.Optimizer]] = {
        Optimizer.adamw: lambda: torch.optim.AdamW(groups, 0.0, betas, settings.eps),
        Optimizer.adam: lambda: torch.optim.Adam(groups, 0.0, betas, settings.eps),
        Optimizer.sgd: lambda: torch.optim.SGD(groups, 0.0, momentum=settings.momentum),
        Optimizer.rmsprop: lambda: torch.optim.RMSprop(
            groups, 0.0, alpha=settings.beta2, eps=settings.eps, momentum=settings.momentum
        ),
    }
    update = updates[settings.name]()
    routers = [layer.block_sparse_moe.gate for layer in model.model.layers] if model_config.num_experts else []
    curve, norms = [], []
    size = run.global_batch_size
    for step in range(run.max_steps):
        rows = [dataset[int(i)] for i in sample_order(len(dataset), step * size, size, 0)]
        tokens = torch.from_numpy(np.stack(rows))
        update.zero_grad()
        total = 0.0
        # How experts are balanced is a matter of each micro batch; the rest does not depend on how rows are cut.
        parts = tokens.split(run.micro_batch_size if model_config.num_experts else size)
        for part in parts:
            inputs, targets = part[:, :-1], part[:, 1:]
            gates: list[torch.Tensor] = []
            hooks = [gate.register_forward_hook(lambda _, x, y, gates=gates: gates.append(y)) for gate in routers]
            loss = loss_fn(model(inputs), inputs, targets) / tokens[:, 1:].numel() + unbalance(
                gates, model_config
            ) / len(parts)
            for hook in hooks:
                hook.remove()
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), run.gradient_clipping))
        for group in update.param_groups:
            group["lr"] = learning_rate(run, step)
        update.step()
        curve.append(total)
    assert max(norms) > 1.5 * run.gradient_clipping, "the clip value has to bind, or a wrong norm does not show"
    return curve


def bare_curves(job: TrainingJob) -> tuple[list[float], float]:
    """The float64 curve, and how far a float32 one strays from it."""
    run = job.run
    train = run.train if run.model.num_experts else replace(run.train, micro_batch_size=1)  # cached
    truth, plain = (
        bare_losses(run.model, run.train.optimizer, job.tokens_dir, job.teacher_dir, dtype, train)
        for dtype in (torch.float64, torch.float32)
    )
    return truth, max(abs(a - b) for a, b in zip(plain, truth, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, case in NAMED.items() if "precision" not in case.engine])
def test_the_loss_curve_is_that_of_a_bare_loop(name: str, jobs: dict[str, TrainingJob]) -> None:
    """Within four times what float32 itself costs the bare loop against float64, plus rounding of the loss."""
    got = losses(jobs[name])
    truth, noise = bare_curves(jobs[name])
    worst = max(abs(a - b) for a, b in zip(got, truth, strict=True))
    assert worst <= 4 * noise + 4 * EPS * max(truth), f"{worst} against noise {noise}"
    assert truth[-1] < truth[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, case in NAMED.items() if "precision" in case.engine])
def test_bf16_trains_close_to_fp32(name: str, jobs: dict[str, TrainingJob]) -> None:
    """bf16 keeps 8 bits: some 20 roundings on the way to the loss cost 2^-9 each at most, and partly cancel."""
    truth, _ = bare_curves(jobs[name])
    assert max(abs(a - b) / b for a, b in zip(losses(jobs[name]), truth, strict=True)) <= 20**0.5 * 2**-9


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMED)
def test_the_weights_put_together_are_the_trained_ones(name: str, jobs: dict[str, TrainingJob]) -> None:
    """The saved model has the validation loss that the ranks measured together."""
    job = jobs[name]
    assert len(losses(job)) == 20
    measured = json.loads((job.log_dir / "summary.json").read_text())["best_validation_loss"]
    model = load_decoder(job.best_dir)
    dataset = PackedDataset(job.tokens_dir, "validation", SEQUENCE_LENGTH)
    count = job.run.train.eval_tokens // SEQUENCE_LENGTH
    tokens = torch.from_numpy(np.stack([dataset[i] for i in range(count)]))
    with torch.no_grad():
        whole = cross_entropy(model(tokens[:, :-1]), tokens, tokens[:, 1:]).item() / tokens[:, 1:].numel()
    rounding = 20**0.5 * 2**-9 if job.run.engine.precision == Precision.bf16 else 32 * EPS
    assert abs(measured - whole) <= rounding * whole
