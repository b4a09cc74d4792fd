# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Rotary positions in the Triton language: the kernel and the functions that launch it (see `kernels.rotary`).

A program turns all heads of one token, queries and keys, which lie side by side in a projection, and so reads the
token's cosines and sines once. Any strides will do; a negative sign turns back.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_constants import constants


class Tile(NamedTuple):
    """What a program turns at once."""

    pairs: int
    warps: int


TILES = {80: Tile(2048, 4), 90: Tile(2048, 4), 100: Tile(2048, 4)}


@triton.jit
def _turn(x_ptr, y_ptr, cos, sin, num_heads, head_stride, stride, half, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    pairs = tl.arange(0, PAIRS)[None, :]  # [1, PAIRS]
    for start in range(0, num_heads, HEADS):
        heads = start + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
        inside = (heads < num_heads) & (pairs < half)  # [HEADS, PAIRS]
        first = heads.to(tl.int64) * head_stride + pairs * stride  # [HEADS, PAIRS]
        second = first + half * stride
        x = tl.load(x_ptr + first, mask=inside).to(tl.float32)  # [HEADS, PAIRS]
        y = tl.load(x_ptr + second, mask=inside).to(tl.float32)  # [HEADS, PAIRS]
        tl.store(y_ptr + first, (x * cos - y * sin).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + second, (y * cos + x * sin).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])  # the batch's shape recompiles nothing
def _rotary(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, sign, length, q_heads, k_heads, half,
    q_batch_stride, q_head_stride, q_token_stride, q_stride, k_batch_stride, k_head_stride, k_token_stride, k_stride,
    angle_batch_stride, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sequence, token = (program // length).to(tl.int64), (program % length).to(tl.int64)
    pairs = tl.arange(0, PAIRS)[None, :]  # [1, PAIRS]
    angle = sequence * angle_batch_stride + token * 2 * half + pairs  # [1, PAIRS]
    cos = tl.load(cos_ptr + angle, mask=pairs < half).to(tl.float32)  # [1, PAIRS]
    sin = sign * tl.load(sin_ptr + angle, mask=pairs < half).to(tl.float32)  # [1, PAIRS]
    start = sequence * q_batch_stride + token * q_token_stride
    _turn(q_ptr + start, q_out_ptr + start, cos, sin, q_heads, q_head_stride, q_stride, half, Q_HEADS, PAIRS)
    start = sequence * k_batch_stride + token * k_token_stride
    _turn(k_ptr + start, k_out_ptr + start, cos, sin, k_heads, k_head_stride, k_stride, half, K_HEADS, PAIRS)


def rotary_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turns queries [B, H, L, K] and keys [B, G, L, K] in place, whatever their strides.

    Args:
        q: Queries.
        k: Keys.
        cos: Cosines [B or 1, 1, L, K]; the first half of each row counts.
        sin: Sines, alike.
    """
    _launch(q, k, q, k, cos, sin, 1.0)


def rotary_bwd(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries [B, H, L, K] and keys [B, G, L, K] before they were turned, in memory of their own.

    Args:
        dq: Gradient of the turned queries.
        dk: Gradient of the turned keys.
        cos: As in the forward pass.
        sin: As in the forward pass.
    """
    dq_in, dq_out = _source_and_target(dq)
    dk_in, dk_out = _source_and_target(dk)
    _launch(dq_in, dk_in, dq_out, dk_out, cos, sin, -1.0)
    return dq_out, dk_out


def _source_and_target(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where to read and where to write, with the same strides; a copy for both where `x` has gaps or overlaps."""
    target = torch.empty_like(x)
    return (x, target) if target.stride() == x.stride() else (target.copy_(x), target)


def _launch(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    batch, q_heads, length, width = q.shape
    k_heads = k.shape[1]
    if not batch * length:
        return
    cos, sin = cos.contiguous(), sin.contiguous()
    tile = constants(TILES, q.device)
    pairs = triton.next_power_of_2(width // 2)
    at_once = max(1, tile.pairs // pairs)
    _rotary[(batch * length,)](
        q, k, q_out, k_out, cos, sin, sign, length, q_heads, k_heads, width // 2, *q.stride(), *k.stride(),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        Q_HEADS=min(at_once, triton.next_power_of_2(q_heads)), K_HEADS=min(at_once, triton.next_power_of_2(k_heads)),
        PAIRS=pairs, num_warps=tile.warps,
    )  # fmt: skip
