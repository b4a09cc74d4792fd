# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Quantization to 8 bits in the Triton language: kernels and the functions that launch them.

A program holds whole groups of columns in registers, so that each number is read once: 4096 numbers, or one group where
that is longer. Codes are rounded without a conversion instruction: adding 1.5 * 2^23 leaves an integer's bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import LARGEST_CODE, SMALLEST_MAGNITUDE
from kernels.whole_rows import whole_rows

_NUMBERS = 4096
"""What a program holds at least: 32 for each of 128 threads."""
_SMALLEST = tl.constexpr(SMALLEST_MAGNITUDE)
_ROUNDING = tl.constexpr(1.5 * 2**23)
"""A float32 as large as this has steps of one, and its low bits hold what was added, in two's complement."""


@triton.jit
def _places(num_groups, group_size, groups_per_row, row_stride, BLOCK_GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Groups of this program, where their columns lie in rows that may lie apart and in rows that do not."""
    groups = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)  # [BLOCK_GROUPS]
    columns = tl.arange(0, BLOCK)
    inside = (groups < num_groups)[:, None] & (columns < group_size)[None, :]  # [BLOCK_GROUPS, BLOCK]
    starts = (groups // groups_per_row).to(tl.int64) * row_stride + groups % groups_per_row * group_size
    apart = starts[:, None] + columns[None, :]
    together = (groups.to(tl.int64) * group_size)[:, None] + columns[None, :]
    return groups, inside, apart, together


@triton.jit(do_not_specialize=["num_groups"])
def _quantize(
    x_ptr, codes_ptr, scales_ptr, row_stride, num_groups, groups_per_row, group_size,
    LARGEST_CODE: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    groups, inside, apart, together = _places(num_groups, group_size, groups_per_row, row_stride, BLOCK_GROUPS, BLOCK)
    x = tl.load(x_ptr + apart, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_GROUPS, BLOCK]
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # order like the numbers, with NaN above infinity
    largest = tl.max(magnitudes, 1).to(tl.float32, bitcast=True)  # [BLOCK_GROUPS]
    largest = tl.where(largest < _SMALLEST, _SMALLEST, largest)  # keeps NaN
    limit = tl.full((BLOCK_GROUPS,), LARGEST_CODE, tl.float32)
    tl.store(scales_ptr + groups, tl.div_rn(largest, limit), mask=groups < num_groups)
    steps = x * tl.div_rn(limit, largest)[:, None]  # at most the limit and half a unit of its last place
    if codes_ptr.dtype.element_ty == tl.int8:
        codes = (steps + _ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        codes = steps.to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + together, codes, mask=inside)


@triton.jit(do_not_specialize=["num_groups"])
def _dequantize(
    codes_ptr, scales_ptr, y_ptr, row_stride, num_groups, groups_per_row, group_size,
    BLOCK_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    groups, inside, apart, together = _places(num_groups, group_size, groups_per_row, row_stride, BLOCK_GROUPS, BLOCK)
    codes = tl.load(codes_ptr + apart, mask=inside)  # [BLOCK_GROUPS, BLOCK]
    scales = tl.load(scales_ptr + groups, mask=groups < num_groups, other=0.0).to(tl.float32)  # [BLOCK_GROUPS]
    y = codes.to(tl.float32) * scales[:, None]
    tl.store(y_ptr + together, y.to(y_ptr.dtype.element_ty), mask=inside)


def quantize(x: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [N, K] in `dtype` and scales [N, K / group_size] in float32.

    Args:
        x: Numbers [N, K]; rows may lie apart, their elements may not.
        group_size: Columns of a group; divides K.
        dtype: int8 or E4M3.
    """
    num_rows, num_columns = x.shape
    x = whole_rows(x)
    codes = torch.empty((num_rows, num_columns), dtype=dtype, device=x.device)
    scales = torch.empty((num_rows, num_columns // group_size), dtype=torch.float32, device=x.device)
    if scales.numel():
        blocks = _blocks(group_size)
        _quantize[(triton.cdiv(scales.numel(), blocks["BLOCK_GROUPS"]),)](
            x, codes, scales, x.stride(0), scales.numel(), scales.shape[1], group_size,
            LARGEST_CODE=LARGEST_CODE[dtype], **blocks,
            enable_fp_fusion=False,  # a fused multiply-add would round steps once less than the reference
        )  # fmt: skip
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [N, K] in `dtype`.

    Args:
        codes: int8 or E4M3 [N, K]; rows may lie apart, their elements may not.
        scales: Scale of each group of columns [N, K / group_size].
        dtype: float32, float16 or bfloat16.
    """
    num_rows, num_columns = codes.shape
    codes = whole_rows(codes)
    y = torch.empty((num_rows, num_columns), dtype=dtype, device=codes.device)
    if scales.numel():
        group_size = num_columns // scales.shape[1]
        blocks = _blocks(group_size)
        _dequantize[(triton.cdiv(scales.numel(), blocks["BLOCK_GROUPS"]),)](
            codes, scales.contiguous(), y, codes.stride(0), scales.numel(), scales.shape[1], group_size, **blocks
        )
    return y


def _blocks(group_size: int) -> dict[str, int]:
    block = triton.next_power_of_2(group_size)
    warps = 4 if block <= _NUMBERS else 8 if block <= 2 * _NUMBERS else 16
    return {"BLOCK_GROUPS": max(1, _NUMBERS // block), "BLOCK": block, "num_warps": warps}
