"""The reference draws from the distribution that the settings define, which a sort in float64 gives."""

import pytest
import torch
from torch import Tensor

from kernels.reference import sample_tokens

DRAWS = 10_000


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """By sorting, in float64; of tokens with equal scores all are kept or none."""
    probabilities = (logits.double() / temperature).softmax(0)
    if top_k:
        kth = logits.sort(descending=True).values[min(top_k, len(logits)) - 1]
        probabilities = probabilities.where(logits >= kth, 0)
    better = probabilities.where(logits > logits[:, None], 0).sum(1)
    probabilities = probabilities.where(better < top_p * probabilities.sum(), 0)
    return probabilities / probabilities.sum()


def drawn(logits: Tensor, temperature: float, top_k: int, top_p: float, seed: Tensor, step: Tensor) -> Tensor:
    settings = (torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p))
    return sample_tokens(logits.expand(len(seed), -1), *(each.expand(len(seed)) for each in settings), seed, step)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 7, 1.0), (1.0, 0, 0.6), (1.5, 12, 0.8), (1.0, 3, 0.05), (1.0, 2, 1.0)],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(3))
    logits[4] = logits[9] = logits.sort(descending=True).values[1]  # three second best
    order = torch.arange(DRAWS)
    expected = distribution(logits, temperature, top_k, top_p) * DRAWS
    for seed, step in ((order, torch.zeros_like(order)), (torch.full_like(order, 5), order)):
        counts = drawn(logits, temperature, top_k, top_p, seed, step).bincount(minlength=30).double()
        kept = expected > 0
        assert not counts[~kept].any()
        # chi-square: mean and half the variance are the degrees of freedom; six deviations
        freedom = int(kept.sum()) - 1
        deviation = ((counts - expected)[kept].square() / expected[kept]).sum()
        assert deviation <= freedom + 6 * (2 * freedom) ** 0.5 + 1e-6


def test_steps_and_seeds_are_independent() -> None:
    """Neighbouring draws agree as often as chance has it."""
    logits, order = torch.zeros(16), torch.arange(DRAWS)
    one = drawn(logits, 1.0, 0, 1.0, order, torch.zeros_like(order))
    for seed, step in ((order + 1, 0), (order, 1), (-order, 0), (order * 2**32, 0)):
        same = (one == drawn(logits, 1.0, 0, 1.0, seed, torch.full_like(order, step)))[1:].double().mean()
        assert abs(same - 1 / 16) < 6 * (15 / 256 / DRAWS) ** 0.5


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, torch.nan])
    assert drawn(logits, 0.0, 0, 1.0, torch.arange(5), torch.arange(5)).tolist() == [1] * 5
