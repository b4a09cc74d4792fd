"""Losses, schedules and raw DeepSpeed keys, against formulas written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flows.config import ConfigError
from flows.config.distillation import Divergence
from flows.config.engine import EngineConfig
from flows.config.lora import LoraConfig
from flows.config.model import ModelConfig
from flows.config.optimizer import OptimizerConfig
from flows.config.training import Schedule, TrainConfig, TrainingRun
from flows.model.decoder import Decoder, initialize
from flows.training import objectives
from flows.training.batches import IGNORED
from flows.training.deepspeed_config import deepspeed_config
from flows.training.lora import add_adapters
from flows.training.objectives import Distillation, Loss, LossModule, cross_entropy, scoring_head
from flows.training.schedules import ema_decay, learning_rate
from kernels import head_chunks


def decoder(seed: int, **shape: Any) -> Decoder:
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1} | shape
    model = Decoder(ModelConfig(num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, **shape), 50)
    initialize(model, seed)
    return model.double()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :3] = IGNORED
    return tokens[:, :-1], targets, torch.tensor(13.0)


def results(model: nn.Module, loss: Loss, trains: bool = True) -> list[torch.Tensor]:
    """The loss, and the gradient of each weight."""
    module = LossModule(model, loss).train(trains)
    mean = module(*batch())
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [mean.detach(), *torch.autograd.grad(mean, weights)]


class Scores(nn.Module):
    """A model of which nothing is known but its scores."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids)  # type: ignore[no-any-return]


LOSSES: dict[str, Callable[[nn.Module], Loss]] = {
    "cross-entropy": lambda teacher: cross_entropy,
    **{kind.value: partial(Distillation, temperature=2.0, alpha=0.7, divergence=kind) for kind in Divergence},
    "jsd of little weight": partial(Distillation, temperature=1.0, alpha=1.0, divergence=Divergence.jsd, beta=0.1),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_hidden_states_have_the_loss_of_their_scores(name: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "CPU_TOKENS", 5)
    monkeypatch.setattr(objectives, "CHUNK_TOKENS", 5)
    student, teacher = decoder(0, tie_word_embeddings=tied), decoder(1, hidden_size=16, num_hidden_layers=2)
    ours = results(student, LOSSES[name](teacher))
    for whole in (Scores(student), student):  # scores of the student, or of the teacher, and so of both
        theirs = results(whole, LOSSES[name](Scores(teacher) if whole is student else teacher))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
    assert ours[0] != 0
    assert results(student, LOSSES[name](teacher), trains=False)[0] == results(student, cross_entropy)[0]


def test_scores_of_all_tokens_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "CPU_TOKENS", 5)
    student, teacher = decoder(0), decoder(1)
    tokens = batch()[0].numel()

    class NoScores(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                assert not (result.dim() > 1 and result.shape[-1] >= 50 and result.numel() >= tokens * 50), func
            return result

    with NoScores():
        for loss in (cross_entropy, Distillation(teacher, 2.0, 0.5)):
            results(student, loss)
    with pytest.raises(AssertionError), NoScores():
        results(Scores(student), cross_entropy)


def test_a_head_with_an_adapter_makes_its_scores() -> None:
    model = decoder(0, tie_word_embeddings=False).float()
    assert scoring_head(model) is model.lm_head
    add_adapters(model, LoraConfig(rank=2, targets=("lm_head",)), seed=0)
    assert scoring_head(model) is None
    with torch.no_grad():
        model.lm_head.lora_B.weight.fill_(0.1)
    ours, theirs = results(model, cross_entropy), results(Scores(model), cross_entropy)
    assert len(ours) == 3
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_frozen_heads_and_frozen_models_get_no_gradient() -> None:
    model = decoder(0, tie_word_embeddings=False)
    whole = dict(zip([name for name, _ in model.named_parameters()], results(model, cross_entropy)[1:], strict=True))
    model.lm_head.requires_grad_(False)
    without_head = results(model, cross_entropy)[1:]
    del whole["lm_head.weight"]
    assert all(torch.equal(one, other) for one, other in zip(without_head, whole.values(), strict=True))
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert results(model, cross_entropy)[1].abs().max() > 0


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
        Distillation(Teacher(), temperature, alpha=1.0)(logits, ids, ids).backward()
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
    module = LossModule(student, Distillation(Model(teacher), 2.0, alpha=0.0))
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
