# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Cross-entropy in the Triton language: kernels and the functions that launch them (see `kernels.cross_entropy`).

Bound by memory: the forward pass reads each score once (online softmax with one exponential per score, lane by lane, so
that nothing is reduced inside the loop), the backward pass reads it once more and writes its gradient over it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_constants import constants
from kernels.whole_rows import whole_rows

_IGNORED = tl.constexpr(-100)
_LOWEST = tl.constexpr(-3.4e38)
_CONSTANTS = {80: (2048, 8)}
"""Columns per step of a program, and its warps: one 16-byte load of bfloat16 a thread; not measured."""


@triton.jit
def capped(x, softcap, CAPPED: tl.constexpr):
    """softcap x tanh(x / softcap), or x itself."""
    if CAPPED:
        x = softcap * (1.0 - 2.0 / (tl.exp(x * (2.0 / softcap)) + 1.0))
    return x


@triton.jit
def cap_slope(y, softcap, CAPPED: tl.constexpr):
    """Derivative of `capped` where its result is y."""
    slope = tl.full(y.shape, 1.0, tl.float32)
    if CAPPED:
        slope -= (y / softcap) * (y / softcap)
    return slope


@triton.jit
def add_exponential(largest, total, x):
    """Online softmax: the largest so far and the sum of exponentials relative to it, with x; NaN stays NaN."""
    factor = tl.exp(-tl.abs(x - largest))
    total = tl.where(x > largest, total * factor + 1.0, total + factor)
    return tl.where(x > largest, x, largest), total


@triton.jit
def log_sum(largest, total):
    """Logarithm of the sum of exponentials over all lanes."""
    overall = tl.max(largest, 0)
    return overall + tl.log(tl.sum(total * tl.exp(largest - overall), 0))


@triton.jit
def label_score(row_ptr, target, num_columns, softcap, CAPPED: tl.constexpr):
    """The score of the label; NaN for one outside of the vocabulary, which is not read."""
    known = (target >= 0) & (target < num_columns)
    score = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    return capped(score, softcap, CAPPED)


@triton.jit
def _forward(
    logits_ptr, targets_ptr, losses_ptr, lse_ptr, row_stride, num_columns, softcap, z_loss, smoothing,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    if target == _IGNORED:
        tl.store(losses_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
    else:
        score = label_score(row_ptr, target, num_columns, softcap, CAPPED)
        largest = tl.full((BLOCK,), _LOWEST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        scores = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, num_columns, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < num_columns
            x = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
            x = capped(x, softcap, CAPPED)
            scores += tl.where(inside, x, 0.0)
            largest, total = add_exponential(largest, total, tl.where(inside, x, float("-inf")))
        lse = log_sum(largest, total)
        loss = lse - (1.0 - smoothing) * score + z_loss * lse * lse
        if smoothing != 0.0:  # else 0 x a score of minus infinity
            loss -= smoothing * (tl.sum(scores, 0) / num_columns)
        tl.store(losses_ptr + row, loss)
        tl.store(lse_ptr + row, lse)


@triton.jit
def _backward(
    logits_ptr, gradient_ptr, targets_ptr, lse_ptr, scale_ptr, row_stride, gradient_stride, num_columns, width,
    softcap, z_loss, smoothing, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    target = tl.load(targets_ptr + row)
    gradient = tl.zeros((BLOCK,), tl.float32)  # of padding and ignored labels
    if target != _IGNORED:
        lse = tl.load(lse_ptr + row)
        x = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)  # [BLOCK]
        y = capped(x, softcap, CAPPED)
        wanted = tl.where(columns == target, 1.0 - smoothing, 0.0) + smoothing / num_columns
        slope = tl.load(scale_ptr).to(tl.float32) * cap_slope(y, softcap, CAPPED)
        gradient = tl.where(inside, slope * (tl.exp(y - lse) * (1.0 + 2.0 * z_loss * lse) - wanted), 0.0)
    out_ptr = gradient_ptr + row * gradient_stride + columns
    tl.store(out_ptr, gradient.to(gradient_ptr.dtype.element_ty), mask=columns < width)


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, vocab_size: int, softcap: float, z_loss: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Losses and logarithms of the sums of exponentials, each [N] in float32; zero where the label is ignored.

    Args:
        logits: Scores [N, W]; rows may lie apart, their elements may not.
        targets: Labels [N], int64.
        vocab_size: Leading columns that count, W at most.
        softcap: Scores become softcap x tanh(score / softcap); 0 = they stay.
        z_loss: Weight of the squared logarithm.
        label_smoothing: Share of the label's probability that goes to all tokens alike.
    """
    num_rows = logits.shape[0]
    logits = whole_rows(logits)
    losses, lse = (torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if num_rows:
        block, warps = _launch(vocab_size, logits)
        _forward[(num_rows,)](
            logits, targets.contiguous(), losses, lse, logits.stride(0), vocab_size, softcap, z_loss, label_smoothing,
            CAPPED=softcap != 0, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return losses, lse


def cross_entropy_bwd(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    scale: Tensor,
    vocab_size: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    """Gradient of the losses' sum for the scores [N, W], times `scale` []; arguments as in `cross_entropy_fwd`."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(logits, gradient, targets, lse, scale, vocab_size, softcap, z_loss, label_smoothing)
    return gradient


def cross_entropy_bwd_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    scale: Tensor,
    vocab_size: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
) -> None:
    """Writes what `cross_entropy_bwd` returns over the scores."""
    _write_gradient(logits, logits, targets, lse, scale, vocab_size, softcap, z_loss, label_smoothing)
    torch.autograd.graph.increment_version(logits)  # who saved them has to hear of it


def _write_gradient(
    logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, vocab_size: int, *knobs: float
) -> None:
    num_rows, width = logits.shape
    if logits.stride(1) != 1:
        whole = logits.contiguous()
        _write_gradient(whole, whole, targets, lse, scale, vocab_size, *knobs)
        gradient.copy_(whole)
    elif num_rows:
        block, warps = _launch(width, logits)
        _backward[(num_rows, triton.cdiv(width, block))](
            logits, gradient, targets.contiguous(), lse, scale, logits.stride(0), gradient.stride(0), vocab_size, width,
            *knobs, CAPPED=knobs[0] != 0, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def _launch(columns: int, logits: Tensor) -> tuple[int, int]:
    block, warps = constants(_CONSTANTS, logits.device)
    return min(block, triton.next_power_of_2(columns)), warps
