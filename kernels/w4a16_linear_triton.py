# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Linear layer of 4-bit weights in the Triton language: the kernel and the function that launches it.

Weights are read once and become 16-bit floats in registers, in the layout in which the matrix unit takes them: they are
the left operand, which need not pass through shared memory, and `kernels.int4_layout` keeps whole columns in each
quarter of a word. Few tokens: reading weights is the limit, so that an instruction must do for as many of them as
it can; sums of a group are scaled in float32; and programs share the sum over K. More tokens: weights are scaled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.code_products_triton import Tile, add_splits, choose_splits, choose_tile, finished
from kernels.int4_layout import BLOCK_COLUMNS, SYMMETRIC_ZERO
from kernels.launch_constants import constants
from kernels.whole_rows import whole_rows

_FEW, _SOME = Tile(16, 128, 128, 4, 4), Tile(64, 128, 128, 8, 3)
_TILES = {
    80: (Tile(16, 64, 128, 4, 4), Tile(64, 64, 128, 4, 3), Tile(128, 128, 128, 8, 3)),
    90: (_FEW, _SOME, Tile(128, 128, 128, 8, 3), Tile(256, 128, 128, 8, 3)),
    100: (_FEW, _SOME, Tile(128, 64, 128, 4, 3)),  # more weights or tokens exceed the tensor memory
}
"""Tiles from small to large for each architecture; a step is a block of packed columns. Derived from registers and
shared memory, not yet measured."""
_ZERO = tl.constexpr(SYMMETRIC_ZERO)
_QUARTER = tl.constexpr(BLOCK_COLUMNS // 4)


@triton.jit
def _group(scales_ptr, zeros_ptr, place, inside, dtype: tl.constexpr):
    """Scales of the channels in a group, and 8 less its zero points [BLOCK_N], in the units of `_weights`."""
    unit: tl.constexpr = 64.0 if dtype == tl.bfloat16 else 1.0
    scales = tl.load(scales_ptr + place, mask=inside, other=0.0)
    if zeros_ptr is None:
        shifts = tl.full(scales.shape, 0.0, dtype)
    else:
        zeros = tl.load(zeros_ptr + place, mask=inside, other=0).to(tl.int16)
        shifts = (zeros - _ZERO).to(dtype) * (-1 / unit)
    return scales * unit, shifts  # exact: by a power of two


@triton.jit
def _weights(words, low_shifts, high_shifts, dtype: tl.constexpr):
    """Two codes of each word less their zero points, exactly: those in bits 0 to 3 and 4 to 7, which are not shifted.

    float16: written into the low bits of 1024, a code can be read as a number. bfloat16 has too few bits for that but
    range enough: a code alone is a subnormal number, 2^-133 times the code, and made 1/64 of it. Taking 8 away costs
    nothing, as part of a fused multiply-add of two weights.
    """
    if dtype == tl.bfloat16:
        low = (words & 0x0F).to(dtype, bitcast=True) * 2.0**127 - 0.125
        high = (words & 0xF0).to(dtype, bitcast=True) * 2.0**123 - 0.125
    else:
        low = (words & 0x0F | 0x6400).to(dtype, bitcast=True) - 1032.0
        high = (words & 0xF0 | 0x6400).to(dtype, bitcast=True) * 0.0625 - 72.0
    return low + low_shifts[:, None], high + high_shifts[:, None]


@triton.jit(do_not_specialize=["num_rows", "steps_per_split"])
def _product(
    x_ptr, packed_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    x_stride, packed_stride, num_rows, num_channels, num_columns, num_steps, steps_per_split,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, SCALES_WEIGHTS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_channels, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)  # neighbours share operands
    split = tl.program_id(1)
    first = split * steps_per_split
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    quarter = tl.arange(0, _QUARTER)
    has_row, has_channel = (rows < num_rows)[None, :], channels < num_channels
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * x_stride + quarter[:, None]  # [QUARTER, BLOCK_M]
    packed_ptrs = packed_ptr + channels.to(tl.int64)[:, None] * packed_stride + quarter[None, :]  # [BLOCK_N, QUARTER]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, tl.minimum(first + steps_per_split, num_steps)):
        words = tl.load(packed_ptrs + step * _QUARTER, mask=has_channel[:, None], other=0)
        for byte in tl.static_range(2):
            column = (4 * step + 2 * byte) * _QUARTER
            left = num_columns - column  # none where a last block is filled up
            has_low = has_row if EVEN else has_row & (quarter < left)[:, None]
            has_high = has_row if EVEN else has_row & (quarter + _QUARTER < left)[:, None]
            low_x = tl.load(x_ptrs + column, mask=has_low, other=0.0)
            high_x = tl.load(x_ptrs + column + _QUARTER, mask=has_high, other=0.0)
            if byte == 0 or GROUP <= 2 * _QUARTER:
                place = (column // GROUP).to(tl.int64) * num_channels + channels
                low_scales, low_shifts = _group(scales_ptr, zeros_ptr, place, has_channel & (left > 0), dtype)
                high_scales, high_shifts = low_scales, low_shifts
            if GROUP == _QUARTER:
                has_group = has_channel & (left > _QUARTER)
                high_scales, high_shifts = _group(scales_ptr, zeros_ptr, place + num_channels, has_group, dtype)
            low, high = _weights(words if byte == 0 else words >> 8, low_shifts, high_shifts, dtype)
            if SCALES_WEIGHTS:
                sums = tl.dot(low * low_scales[:, None], low_x, sums)
                sums = tl.dot(high * high_scales[:, None], high_x, sums)
            elif GROUP == _QUARTER:
                sums += tl.dot(low, low_x) * low_scales.to(tl.float32)[:, None]
                sums += tl.dot(high, high_x) * high_scales.to(tl.float32)[:, None]
            elif GROUP == 2 * _QUARTER:
                sums += tl.dot(high, high_x, tl.dot(low, low_x)) * low_scales.to(tl.float32)[:, None]
            elif byte == 0:
                part = tl.dot(high, high_x, tl.dot(low, low_x))
            else:
                sums += tl.dot(high, high_x, tl.dot(low, low_x, part)) * low_scales.to(tl.float32)[:, None]
    inside = has_row & has_channel[:, None]
    start = (split.to(tl.int64) * num_rows + tile_m * BLOCK_M) * num_channels  # where this tile's first row begins
    place = tl.arange(0, BLOCK_M)[None, :] * num_channels + channels[:, None]  # [BLOCK_N, BLOCK_M]
    if SPLITS > 1:
        tl.store(y_ptr + start + place, sums, mask=inside)
    else:
        y = finished(sums, None, None, bias_ptr, rows[None, :], channels[:, None], num_rows, num_channels)
        tl.store(y_ptr + start + place, y.to(dtype), mask=inside)


def w4a16_linear(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """Results [M, N] in the dtype of `x`.

    Args:
        x: Activations [M, K]; rows may lie apart, their elements may not.
        packed: Codes in the layout of `kernels.int4_layout`, int16 [N, ceil(K / 128) * 32].
        scales: Scale of each group of columns and channel [K / G, N], in the dtype of `x`.
        zeros: Code that stands for zero, uint8 [K / G, N]; None = 8.
        bias: [N].
    """
    x = whole_rows(x)
    packed, scales = packed.contiguous(), scales.contiguous()
    zeros = zeros if zeros is None else zeros.contiguous()
    bias = bias if bias is None else bias.contiguous()
    (num_rows, num_columns), (num_groups, num_channels) = x.shape, scales.shape
    y = torch.empty((num_rows, num_channels), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    group_size = num_columns // num_groups
    tile = choose_tile(constants(_TILES, x.device), num_rows, num_channels, x.device)
    num_tiles, steps = tile.tiles(num_rows, num_channels), triton.cdiv(num_columns, BLOCK_COLUMNS)
    splits = choose_splits(num_tiles, num_rows, steps, x.device)
    parts = torch.empty((splits, num_rows, num_channels), device=x.device) if splits > 1 else None
    _product[(num_tiles, splits)](
        x, packed, scales, zeros, bias, y if parts is None else parts,
        x.stride(0), packed.stride(0), num_rows, num_channels, num_columns, steps, triton.cdiv(steps, splits),
        SPLITS=splits, EVEN=num_columns % BLOCK_COLUMNS == 0, SCALES_WEIGHTS=tile.rows > 16, GROUP=group_size,
        BLOCK_M=tile.rows, BLOCK_N=tile.channels, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts is not None:
        add_splits(parts, y, None, None, bias)
    return y
