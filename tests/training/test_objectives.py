"""Losses, schedules and raw DeepSpeed keys, against formulas written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flows.config import ConfigError
from flows.config.engine import EngineConfig
from flows.config.optimizer import OptimizerConfig
from flows.config.training import Schedule, TrainConfig, TrainingRun
from flows.training.batches import IGNORED
from flows.training.deepspeed_config import deepspeed_config
from flows.training.objectives import LossModule, distillation, kl_divergence
from flows.training.schedules import ema_decay, learning_rate


def test_kl_divergence_is_the_sum_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    targets = torch.tensor([[1, IGNORED, 2], [IGNORED, 3, 4]])
    expected = (p * (p.log() - q.log())).sum(-1)[targets != IGNORED].sum()
    eps = torch.finfo(torch.float64).eps
    assert abs(kl_divergence(student, teacher, targets, 2.0) - expected) < 64 * eps
    assert abs(kl_divergence(teacher, teacher, targets, 2.0)) < 64 * eps


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    """d/dlogits of T^2 x KL tends to the difference of centred logits over the vocabulary size (arXiv:1503.02531)."""
    teacher_logits = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)) * 0.1

    class Teacher(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return teacher_logits

    norms = []
    for temperature in (5.0, 50.0):
        logits = torch.zeros(1, 1, 8, requires_grad=True)
        ids = torch.zeros(1, 1, dtype=torch.int64)
        distillation(Teacher(), temperature, alpha=1.0)(logits, ids, ids).backward()
        assert logits.grad is not None
        norms.append(logits.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_alpha_zero_is_cross_entropy_and_the_teacher_is_not_part_of_the_module() -> None:
    teacher = nn.Linear(4, 6)
    embedding = nn.Embedding(6, 4)

    class Model(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.head = head

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(embedding(input_ids))  # type: ignore[no-any-return]

    student = Model(nn.Linear(4, 6))
    ids, targets = torch.randint(6, (2, 3)), torch.randint(6, (2, 3))
    module = LossModule(student, distillation(Model(teacher), 2.0, alpha=0.0))
    targets[0, 0] = IGNORED
    mean = F.cross_entropy(student(ids).flatten(0, 1), targets.flatten())
    assert module(ids, targets, torch.tensor(5.0)).item() == pytest.approx(mean.item(), rel=1e-6)
    assert len(list(module.parameters())) == 2
    assert module.eval()(ids, targets, torch.tensor(5.0)).item() == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected_middle", "expected_last"),
    [
        (Schedule.cosine, 0.55, 0.1),
        (Schedule.linear, 0.55, 0.1),
        (Schedule.constant, 1.0, 1.0),
        (Schedule.wsd, 1.0, 0.1),
    ],
)
def test_schedules(schedule: Schedule, expected_middle: float, expected_last: float) -> None:
    config = TrainConfig(
        max_steps=111, warmup_steps=10, schedule=schedule, optimizer=OptimizerConfig(learning_rate=1.0)
    )
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(expected_middle)
    assert rates[-1] == pytest.approx(expected_last)
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)


def test_wsd_is_stable_and_then_falls_by_one_minus_the_root() -> None:
    config = TrainConfig(
        max_steps=100,
        warmup_steps=10,
        schedule=Schedule.wsd,
        decay_share=0.25,
        min_learning_rate_ratio=0.0,
        optimizer=OptimizerConfig(learning_rate=2.0),
    )
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[9:75] == [2.0] * 66
    assert rates[74:] == pytest.approx([2 * (1 - math.sqrt(n / 25)) for n in range(26)])


def test_the_average_rises_to_its_decay_from_the_weights_themselves() -> None:
    config = TrainConfig(ema_decay=0.9)
    assert [ema_decay(config, step) for step in (0, 1, 9, 81, 82, 1000)] == [0.0, 0.1, 0.5, 0.9, 0.9, 0.9]
    assert ema_decay(TrainConfig(), 1000) == 0.0


def test_raw_deepspeed_keys_pass_through_and_contradictions_are_refused(tiny_run: Callable[..., TrainingRun]) -> None:
    raw = {"zero_optimization": {"stage": 1, "overlap_comm": False}, "wall_clock_breakdown": True}
    config = deepspeed_config(tiny_run(engine=EngineConfig(deepspeed=raw)))
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert config["wall_clock_breakdown"] is True
    contradiction = tiny_run(engine=EngineConfig(deepspeed={"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match=r"engine.deepspeed.zero_optimization.stage=3 contradicts .* makes it 1"):
        deepspeed_config(contradiction)
