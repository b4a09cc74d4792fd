# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Drawing tokens in the Triton language: the kernel and the function that launches it.

A program draws for one request and reads its row a few times, from the second level cache where it is not too long:
for the best score, four times for the k-th best (a radix select by histograms), for the sum, and once or twice a draw.
Registered in `kernels.sample_tokens`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_constants import constants
from kernels.whole_rows import whole_rows


class _Launch(NamedTuple):
    """Columns read at once, and how the kernel runs."""

    block: int
    warps: int


_CONSTANTS = {0: _Launch(64, 4), 80: _Launch(4096, 8)}
"""By architecture; not measured."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_ONE = tl.constexpr(float(2**40))
"""Weight of the best token."""
_FRACTION = tl.constexpr(2**31)
"""Of which fractions are numerators."""


@triton.jit
def _mixed(bits):
    """SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
    bits += 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _share(mass, numerator):
    """Rounded down, mass * numerator / 2^31, of a mass below 2^62."""
    return (mass >> 31) * numerator + (((mass & (_FRACTION - 1)) * numerator) >> 31)


@triton.jit
def _scores(logits_ptr, columns, vocabulary):
    scores = tl.load(logits_ptr + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
    return tl.where(scores == scores, scores, -float("inf"))  # what is not a number is never drawn


@triton.jit
def _keys(scores):
    """Integers in the order of the scores: their bits, those of negative numbers turned."""
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weights(scores, kept_from, above, best, scale):
    """Integer probabilities of the scores that are at least `kept_from` and higher than `above`."""
    power = (scores - best) * scale
    counts = (scores >= kept_from) & (scores > above) & (power > -41.0)
    return tl.where(counts, tl.exp2(power) * _ONE, 0.0).to(tl.int64)


@triton.jit
def _mass(logits_ptr, end, kept_from, above, best, scale, BLOCK: tl.constexpr):
    mass = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, end, BLOCK):
        scores = _scores(logits_ptr, start + tl.arange(0, BLOCK), end)
        mass += _weights(scores, kept_from, above, best, scale)
    return tl.sum(mass, 0)


@triton.jit
def _kth_best(logits_ptr, vocabulary, k, BLOCK: tl.constexpr):
    """The k-th highest score, eight bits of it at a time."""
    bins = tl.arange(0, 256)
    prefix = tl.zeros((), tl.int32)
    for level in range(4):
        shift = 24 - 8 * level
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            keys = (_keys(_scores(logits_ptr, columns, vocabulary)) ^ -0x80000000).to(tl.uint32, bitcast=True)
            head = keys >> shift
            member = (columns < vocabulary) & ((head >> 8).to(tl.int32) == prefix)
            counts += tl.histogram((head & 255).to(tl.int32), 256, mask=member)
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum((at_least >= k).to(tl.int32), 0) - 1
        k -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        prefix = prefix * 256 + digit
    bits = prefix ^ -0x80000000
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _draw(logits_ptr, target, kept_from, above, best, scale, BLOCK: tl.constexpr, vocabulary):
    """The first token up to which the weights add up to more than the target."""
    token = tl.full((), -1, tl.int32)
    seen = tl.zeros((), tl.int64)
    start = tl.zeros((), tl.int32)
    while token < 0:
        weights = _weights(
            _scores(logits_ptr, start + tl.arange(0, BLOCK), vocabulary), kept_from, above, best, scale
        )  # fmt: skip
        mass = tl.sum(weights, 0)
        if seen + mass > target:
            token = start + tl.sum((seen + tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
        seen += mass
        start += BLOCK
    return token


@triton.jit(do_not_specialize=["row_stride", "vocabulary"])
def _sample(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr, step_ptr, token_ptr, row_stride, vocabulary,
    BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    logits_ptr += request * row_stride
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocabulary, BLOCK):
        scores = _scores(logits_ptr, start + lane, vocabulary)
        place = tl.where(scores > highest, start, place)
        highest = tl.maximum(highest, scores)
    best = tl.max(highest, 0)
    token = tl.min(tl.where(highest == best, place + lane, vocabulary), 0)
    temperature = tl.load(temperature_ptr + request)
    if (temperature > 0.0) & (tl.abs(best) < float("inf")):
        scale = tl.div_rn(_LOG2_E, temperature)
        k = tl.load(top_k_ptr + request).to(tl.int32)
        kept_from = -float("inf")
        if (k > 0) & (k < vocabulary):
            kept_from = _kth_best(logits_ptr, vocabulary, k, BLOCK)
        p = tl.load(top_p_ptr + request)
        mass = _mass(logits_ptr, vocabulary, kept_from, -float("inf"), best, scale, BLOCK)
        needed = _share(mass, tl.maximum((tl.minimum(p, 1.0) * _FRACTION).to(tl.int64), 1))
        checked = tl.where(p < 1.0, vocabulary, 0)  # nothing to check where nothing is cut off
        stream = _mixed(_mixed(tl.load(seed_ptr + request).to(tl.uint64)) + tl.load(step_ptr + request).to(tl.uint64))
        above = -float("inf")
        drawn = tl.full((), -1, tl.int32)
        while drawn < 0:
            stream = _mixed(stream)
            target = _share(mass, (stream >> 33).to(tl.int64))
            token = _draw(logits_ptr, target, kept_from, above, best, scale, BLOCK, vocabulary)
            above = tl.load(logits_ptr + token).to(tl.float32)
            mass = _mass(logits_ptr, checked, kept_from, above, best, scale, BLOCK)
            drawn = tl.where(mass < needed, token, -1)
    tl.store(token_ptr + request, token.to(tl.int64))


def sample_tokens_fwd(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, step: Tensor
) -> Tensor:
    """A token for each request, int64 [S]; arguments as in `kernels.sample_tokens`."""
    requests, vocabulary = logits.shape
    logits = whole_rows(logits)
    tokens = torch.empty(requests, dtype=torch.int64, device=logits.device)
    if requests:
        launch = constants(_CONSTANTS, logits.device)
        _sample[(requests,)](
            logits, temperature.float().contiguous(), top_k.contiguous(), top_p.float().contiguous(),
            seed.contiguous(), step.contiguous(), tokens, logits.stride(0), vocabulary,
            BLOCK=launch.block, num_warps=launch.warps,
        )  # fmt: skip
    return tokens
