# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Products of 8-bit codes in the Triton language: kernels and the functions that launch them.

Both operands lie along K, as 8-bit matrix units want them. The weights are the tall operand, so that an instruction for
64 rows is full however few tokens there are; few tokens also divide the sum over K among programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.code_products_triton import Tile, add_splits, choose_splits, choose_tile, finished
from kernels.launch_constants import constants
from kernels.reference import INT8
from kernels.whole_rows import whole_rows

_FEW, _SOME = Tile(16, 64, 256, 4, 4), Tile(64, 128, 128, 4, 3)
_INT8 = {
    80: (_FEW._replace(columns=128), _SOME, Tile(128, 128, 128, 8, 3)),
    90: (_FEW, _SOME._replace(stages=4), Tile(128, 128, 128, 8, 3), Tile(128, 256, 128, 8, 4)),
    100: (_FEW, _SOME._replace(stages=4), Tile(128, 128, 128, 8, 3)),  # int8 is done by the units of sm_80 there
}
_FP8 = {
    80: _INT8[80],  # for sm_89
    90: (*_INT8[90][:2], Tile(128, 128, 128, 8, 4)),  # sums in float32 need registers of their own
}
"""Tiles from small to large for each architecture: the first that holds all tokens, else the last that keeps every
processor busy. Derived from registers and shared memory, not yet measured."""


@triton.jit(do_not_specialize=["num_rows", "steps_per_split"])
def _product(
    x_ptr, weight_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    x_stride, weight_stride, num_rows, num_channels, num_columns, steps_per_split,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_channels, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)  # neighbours share operands
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = split * steps_per_split * BLOCK_K + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * x_stride + columns[:, None]  # [BLOCK_K, BLOCK_M]
    weight_ptrs = weight_ptr + channels.to(tl.int64)[:, None] * weight_stride + columns[None, :]  # [BLOCK_N, BLOCK_K]
    has_row, has_channel = (rows < num_rows)[None, :], (channels < num_channels)[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), ACCUMULATOR)
    steps = tl.minimum(steps_per_split, tl.cdiv(num_columns, BLOCK_K) - split * steps_per_split)
    for _ in range(steps):
        if EVEN:
            x = tl.load(x_ptrs, mask=has_row, other=0.0)
            weight = tl.load(weight_ptrs, mask=has_channel, other=0.0)
        else:
            inside = columns < num_columns
            x = tl.load(x_ptrs, mask=has_row & inside[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=has_channel & inside[None, :], other=0.0)
            columns += BLOCK_K
        if tl.int32 == ACCUMULATOR:
            sums = tl.dot(weight, x, sums, out_dtype=tl.int32)
        else:  # what Hopper's units add up themselves has fewer bits than float32
            sums = tl.dot(weight, x, sums, max_num_imprecise_acc=BLOCK_K)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    inside = has_row & has_channel
    start = (split.to(tl.int64) * num_rows + tile_m * BLOCK_M) * num_channels  # where this tile's first row begins
    place = tl.arange(0, BLOCK_M)[None, :] * num_channels + channels[:, None]  # [BLOCK_N, BLOCK_M]
    if SPLITS > 1:
        tl.store(y_ptr + start + place, sums, mask=inside)
    else:
        y = finished(
            sums, x_scale_ptr, weight_scale_ptr, bias_ptr, rows[None, :], channels[:, None], num_rows, num_channels
        )
        tl.store(y_ptr + start + place, y.to(y_ptr.dtype.element_ty), mask=inside)


def w8a8_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Scaled products [M, N] in `dtype`.

    Args:
        x: Codes [M, K]; rows may lie apart, their elements may not.
        weight: Codes of the same kind [N, K], likewise.
        x_scale: float32 [M].
        weight_scale: float32 [N].
        bias: [N].
        dtype: Of the result.
    """
    x, weight = whole_rows(x), whole_rows(weight)
    (num_rows, num_columns), num_channels = x.shape, weight.shape[0]
    y = torch.empty((num_rows, num_channels), dtype=dtype, device=x.device)
    if not y.numel():
        return y
    tiles = constants(_INT8 if x.dtype == INT8 else _FP8, x.device)
    tile = choose_tile(tiles, num_rows, num_channels, x.device)
    num_tiles = tile.tiles(num_rows, num_channels)
    steps = triton.cdiv(num_columns, tile.columns)
    splits = choose_splits(num_tiles, num_rows, steps, x.device)
    accumulator = torch.int32 if x.dtype == INT8 else torch.float32
    parts = torch.empty((splits, num_rows, num_channels), dtype=accumulator, device=x.device) if splits > 1 else None
    scales = x_scale.contiguous(), weight_scale.contiguous()
    bias = bias if bias is None else bias.contiguous()
    _product[(num_tiles, splits)](
        x, weight, *scales, bias, y if parts is None else parts,
        x.stride(0), weight.stride(0), num_rows, num_channels, num_columns, triton.cdiv(steps, splits),
        SPLITS=splits, EVEN=num_columns % tile.columns == 0,
        BLOCK_M=tile.rows, BLOCK_N=tile.channels, BLOCK_K=tile.columns,
        ACCUMULATOR=tl.int32 if x.dtype == INT8 else tl.float32, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts is not None:
        add_splits(parts, y, *scales, bias)
    return y
