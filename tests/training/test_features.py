"""Hidden states and relations: against formulas in float64, what they do not depend on, and how they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flows.artifact import Artifact
from flows.config.distillation import Distance, HiddenConfig, RelationsConfig, spread_layers
from flows.config.engine import EngineConfig
from flows.config.training import Objective, TrainingRun
from flows.data.tokenizer import copy_tokenizer
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize
from flows.training.features import Features, hidden_losses, relation_losses
from flows.training.objectives import LossModule, cross_entropy
from tests.training.conftest import SEQUENCE_LENGTH, TINY, VOCAB_SIZE

WIDE = replace(TINY, hidden_size=48, num_hidden_layers=4)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder(shape: object, seed: int) -> Decoder:
    model = Decoder(replace(TINY, initializer_range=0.3) if shape is TINY else WIDE, VOCAB_SIZE)
    initialize(model, seed)
    return model.double()


@pytest.mark.parametrize(
    ("students", "teachers", "expected"), [(2, 4, (1, 3)), (3, 4, (1, 2, 3)), (4, 4, (0, 1, 2, 3))]
)
def test_layers_are_spread_evenly(students: int, teachers: int, expected: tuple[int, ...]) -> None:
    assert spread_layers(students, teachers) == expected


def test_hidden_losses_are_their_formulas() -> None:
    ours, theirs = drawn(2, 3, 8), drawn(2, 3, 8, seed=1)
    squares = [
        [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 8 for x, y in zip(r, s, strict=True)]
        for r, s in zip(ours.tolist(), theirs.tolist(), strict=True)
    ]
    torch.testing.assert_close(hidden_losses(ours, theirs, Distance.mse), torch.tensor(squares, dtype=torch.float64))
    cosines = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
    torch.testing.assert_close(hidden_losses(ours, theirs, Distance.cosine), 1 - cosines)
    assert hidden_losses(ours, 7 * ours, Distance.cosine).abs().max() < 1e-12


def test_relation_losses_are_the_paper_s_formula_and_know_no_width_and_no_turn() -> None:
    length, heads = 5, 2
    ours, theirs = drawn(1, length, 12), drawn(1, length, 20, seed=1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None]
    losses = relation_losses(ours, theirs, heads, causal)
    expected = torch.zeros(length, dtype=torch.float64)
    for place in range(length):
        for head in range(heads):
            relations = []
            for x in (theirs, ours):
                width = x.shape[-1] // heads
                part = x[0, :, head * width : (head + 1) * width]
                relations.append(torch.softmax(part[: place + 1] @ part[place] / width**0.5, 0))
            p, q = relations
            expected[place] += (p * (p / q).log()).sum() / heads
    torch.testing.assert_close(losses[0], expected)
    turn = torch.linalg.qr(drawn(6, 6, seed=2)).Q
    turned = (ours.view(1, length, heads, 6) @ turn).flatten(2)
    torch.testing.assert_close(relation_losses(turned, theirs, heads, causal), losses)
    assert not torch.allclose(
        relation_losses(ours @ torch.linalg.qr(drawn(12, 12, seed=3)).Q, theirs, 2, causal), losses
    )
    assert relation_losses(turned, ours, heads, causal).abs().max() < 1e-12


def test_other_documents_and_tokens_that_do_not_count_change_nothing(tiny_run: Callable[..., TrainingRun]) -> None:
    run = replace(
        tiny_run(),
        hidden=HiddenConfig(weight=0.5),
        relations=RelationsConfig(weight=2.0, heads=2),
    )
    student, teacher = decoder(TINY, 0), decoder(WIDE, 1).requires_grad_(False).eval()
    module = LossModule(student, cross_entropy)
    module.features = Features(student, teacher, run)
    tokens = torch.randint(1, VOCAB_SIZE, (1, 13), generator=torch.Generator().manual_seed(0))
    ids, targets = tokens[:, :-1], tokens[:, 1:].clone()
    documents = torch.tensor([[0] * 5 + [1] * 7])
    targets[0, 5:] = -100

    def extra(ids: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        one = torch.tensor(1.0)
        full = module.train()(ids, targets[:, : ids.shape[1]], one, documents)
        return full - module.eval()(ids, targets[:, : ids.shape[1]], one, documents)

    alone, together = extra(ids[:, :5], None), extra(ids, documents)
    torch.testing.assert_close(together, alone)
    assert alone.item() > 0
    other = ids.clone()
    other[0, 6] += 1
    assert torch.equal(extra(other, documents), together)
    assert [name for name, _ in module.named_parameters() if "projections" in name] == [
        f"features.projections.{number}.weight" for number in range(2)
    ]
    gradients = torch.autograd.grad(extra(ids, documents), [*module.features.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_the_teacher_itself_is_at_no_distance_and_nothing_of_it_is_trained(
    tiny_run: Callable[..., TrainingRun],
) -> None:
    run = replace(tiny_run(), hidden=HiddenConfig(weight=1.0), relations=RelationsConfig(weight=1.0, heads=2))
    student, teacher = decoder(TINY, 0), decoder(TINY, 0).requires_grad_(False).eval()
    features = Features(student, teacher, run)
    ids = torch.randint(VOCAB_SIZE, (2, 6))
    student(ids)
    assert float(features(ids, ids)) < 1e-6
    assert not isinstance(next(features.children()), Decoder)
    assert list(features.parameters()) == []  # widths are equal


@pytest.fixture
def wide(tmp_path: Path, data: dict[str, Artifact]) -> Artifact:
    """A teacher that is wider and deeper than the students."""
    model = Decoder(WIDE, VOCAB_SIZE).requires_grad_(False)
    initialize(model, seed=5)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5)
    save_decoder(tmp_path / "wide", model.state_dict(), WIDE, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
    copy_tokenizer(data["tokenizer"].path, tmp_path / "wide")
    return Artifact("wide", "wide", "wide", tmp_path / "wide")


def mimicking(run: TrainingRun, **terms: object) -> TrainingRun:
    run = replace(run, objective=Objective.distillation, alpha=0.5)
    return replace(run, **({"hidden": HiddenConfig(weight=0.1)} | terms))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        (2, 2),
        pytest.param(0, 1, marks=pytest.mark.exhaustive),
        pytest.param(0, 2, marks=pytest.mark.exhaustive),
        pytest.param(3, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_every_zero_stage_trains_the_same_and_saves_no_projection(
    trained: Callable[..., Artifact],
    tiny_run: Callable[..., TrainingRun],
    losses: Callable[[Artifact], list[float]],
    wide: Artifact,
    stage: int,
    ranks: int,
) -> None:
    terms = {"relations": RelationsConfig(weight=0.5, heads=2)}
    alone = trained(mimicking(tiny_run(), **terms), teacher=wide)
    run = tiny_run(engine=EngineConfig(zero_stage=stage), ranks=ranks)
    shared = trained(mimicking(run, **terms), store="shared", teacher=wide)
    assert losses(shared) == pytest.approx(losses(alone), abs=3e-6)  # the bound of the parity tests
    with safe_open(shared.path / "model.safetensors", "pt") as file, torch.device("meta"):
        names = set(file.keys())
        assert names == {name for name, _ in Decoder(TINY, VOCAB_SIZE).named_parameters()}
    assert shared.metrics["parameters"] == sum(p.numel() for p in Decoder(TINY, VOCAB_SIZE).parameters())
