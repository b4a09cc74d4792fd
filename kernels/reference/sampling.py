"""Draws of tokens."""

import math

import torch
from torch import Tensor


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, step: Tensor
) -> Tensor:
    """A token for each request, int64 [S]: the draw of `kernels.sample_tokens`, which has the rules and the arguments.

    The same integers in the same steps, so that a draw differs only where an exponential is rounded otherwise and the
    target lies within that rounding.
    """
    scores = logits.float()
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    best, token = scores.max(1, keepdim=True).values, scores.argmax(1)
    draws = (temperature > 0) & best[:, 0].isfinite()
    scale = torch.full_like(best[:, 0], math.log2(math.e)) / temperature.float()
    power = (scores - best) * scale[:, None]
    weights = torch.where((power > -41) & draws[:, None], power.exp2() * 2.0**40, 0).long()  # [S, V]
    last = torch.where(top_k > 0, top_k, scores.shape[1]).clamp(max=scores.shape[1]).long() - 1
    kth = scores.sort(1, descending=True).values.gather(1, last[:, None])
    weights = weights.where(scores >= kth, 0)
    needed = _share(weights.sum(1), (top_p.float().clamp(max=1) * 2.0**31).long().clamp(min=1))
    stream = _mixed(_mixed(seed.long()) + step.long())
    while draws.any():
        stream = _mixed(stream)
        below = weights.cumsum(1)
        target = _share(below[:, -1], stream >> 33 & 0x7FFFFFFF)
        drawn = (below <= target[:, None]).sum(1).clamp(max=scores.shape[1] - 1)
        token = drawn.where(draws, token)
        weights = weights.where(scores > scores.gather(1, token[:, None]), 0)
        draws = draws & (weights.sum(1) >= needed)
    return token


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) in int64, whose shifts would drag the sign along."""
    bits = bits - 0x61C8864680B583EB
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31 & (1 << 33) - 1)


def _share(mass: Tensor, numerator: Tensor) -> Tensor:
    """Rounded down, mass * numerator / 2^31, of a mass below 2^62."""
    return (mass >> 31) * numerator + ((mass & 0x7FFFFFFF) * numerator >> 31)
