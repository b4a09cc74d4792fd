"""Records of a teacher cache: what is read back, how a tail softens, and the loss against the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flows.config.distillation import Divergence
from flows.training.cache_records import pack_records, softened_tail, tail_bounds, unpack_records
from flows.training.objectives import CachedDistillation
from flows.training.record_layout import RecordLayout
from kernels import reference

HALF_ROUNDING = 2.0**-11
"""Largest relative error of a number rounded to float16."""


def scores(vocab_size: int, spread: float = 3.0, rows: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64) * spread


@pytest.mark.parametrize(("vocab_size", "top_k"), [(2, 1), (5, 3), (64, 7), (1000, 64), (66_000, 9)])
def test_ids_come_back_and_log_probabilities_but_for_rounding(vocab_size: int, top_k: int) -> None:
    layout, rows = RecordLayout(top_k, vocab_size), scores(vocab_size)
    records = pack_records(layout, rows)
    assert records.shape == (40, layout.record_bytes)
    assert layout.id_bytes <= (top_k * np.ceil(np.log2(vocab_size)) + 7) // 8
    ids, log_probs, tail = unpack_records(layout, records, 1.0)
    exact, order = rows.log_softmax(-1).topk(top_k)
    assert torch.equal(ids, order)
    rest = rows.log_softmax(-1).scatter(1, order, -torch.inf).logsumexp(-1)
    # each logarithm was rounded, and then all were shifted by one amount, at most the largest of their errors
    errors = HALF_ROUNDING * torch.cat((exact, rest[:, None]), -1).abs()
    assert ((log_probs - exact).abs() <= 2 * errors.amax(-1, keepdim=True) + 1e-5).all()
    assert torch.cat((log_probs, tail[:, None]), -1).exp().sum(-1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 4 / 3, 2.0, 4.0])
def test_softened_distributions_are_those_of_the_scores_at_the_powers_that_are_kept(temperature: float) -> None:
    layout, rows = RecordLayout(16, 300), scores(300)
    ids, log_probs, tail = unpack_records(layout, pack_records(layout, rows), temperature)
    exact = (rows / temperature).log_softmax(-1)
    others = exact.scatter(1, ids, -torch.inf).logsumexp(-1)
    largest = rows.log_softmax(-1).gather(1, ids).abs().amax(-1, keepdim=True).clamp(min=np.log(300))
    assert ((log_probs - exact.gather(1, ids)).abs() <= 2 * HALF_ROUNDING * largest + 1e-5).all()
    assert ((tail - others).abs()[:, None] <= 2 * HALF_ROUNDING * largest + 1e-5).all()


@pytest.mark.parametrize("temperature", [1.1, 1.5, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_between_them_a_tail_lies_within_its_bounds_and_so_does_the_truth(temperature: float, spread: float) -> None:
    log_p = scores(500, spread).log_softmax(-1).sort(descending=True).values[:, 20:]
    tails = torch.stack([(power * log_p).logsumexp(-1) for power in (0.25, 0.5, 0.75, 1.0)], -1)
    truth = (log_p / temperature).logsumexp(-1)
    lower, upper = tail_bounds(tails, 480, 1 / temperature)
    assert ((lower <= truth + 1e-9) & (truth <= upper + 1e-9)).all()
    estimate = softened_tail(tails, 480, 1 / temperature)
    assert ((lower <= estimate) & (estimate <= upper)).all()
    assert ((estimate - truth).abs() <= upper - lower + 1e-9).all()
    share = 0.2 if spread <= 3 else 0.5  # of a wilder tail the quartic knows less
    assert (estimate - truth).abs().mean() < share * (upper - lower).mean()


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("kind", list(Divergence))
def test_gradient_is_the_dense_one_within_the_mass_that_was_not_kept(kind: Divergence, temperature: float) -> None:
    """Sum of absolute differences of one token's gradient: at most 2 alpha T x (tail mass + rounding).

    With forward_kl, kept tokens have the dense gradient q - p, and the others q - (tail of p) q / (tail of q). The
    difference, p against a share of the same mass, is at most twice the teacher's tail. Rounding and interpolation
    change p itself.
    """
    layout, teacher, alpha = RecordLayout(24, 200), scores(200), 0.7
    student = scores(200, 1.0, seed=1).requires_grad_()
    targets = torch.randint(200, (40,), generator=torch.Generator().manual_seed(2))
    targets[3] = -100
    cached = CachedDistillation(layout, temperature, alpha, kind, 0.5)
    records = pack_records(layout, teacher)
    loss = cached.of(records[None])(student[None], targets[None], targets[None])
    value = loss.item()
    dense = reference.distillation(student, targets, teacher, kind.value, 0.5, temperature, alpha).sum()
    (ours,), (theirs,) = torch.autograd.grad(loss, student), torch.autograd.grad(dense, student)
    p = (teacher / temperature).softmax(-1)
    ids, log_probs, tail = unpack_records(layout, records, temperature)
    mass = 1 - p.gather(1, ids).sum(-1)
    rounding = (log_probs.exp() - p.gather(1, ids)).abs().sum(-1) + (tail.exp() - mass).abs()
    assert not ours[3].any()
    counts = targets != -100
    if kind == Divergence.forward_kl:
        bound = 2 * alpha * temperature * (mass + rounding)
        apart = (ours - theirs).abs().sum(-1)
        assert (apart <= bound + 1e-9)[counts].all()
        assert apart[counts].mean() > 0.02 * bound[counts].mean()  # the bound says something
    small = alpha * temperature**2 * rounding[counts].sum() * 20
    assert 0.5 * dense.item() < value <= dense.item() + small.item()  # what is lumped together looks no further apart


def test_all_but_one_token_kept_is_the_dense_loss() -> None:
    layout, teacher = RecordLayout(63, 64), scores(64)
    student, targets = scores(64, 1.0, seed=1), torch.arange(40)
    for temperature in (1.0, 2.0, 3.0):
        loss = CachedDistillation(layout, temperature, 1.0).of(pack_records(layout, teacher)[None])
        dense = reference.distillation(student, targets, teacher, temperature=temperature).sum()
        assert float(loss(student[None], targets[None], targets[None])) == pytest.approx(float(dense), rel=2e-3)
