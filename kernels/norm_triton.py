# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""RMS and layer norm, of a sum or not, in the Triton language: kernels and what launches them (see `kernels.norm`).

A program holds whole rows in registers (up to `kernels.dispatch.MAX_COLUMNS`), so that each element is read once and
written once; of narrow rows it takes several, so that every thread has 16 elements to move. On the way back a few
programs per processor walk over the rows, for few partial weight gradients, and fetch the next rows while they reduce.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_constants import constants, processors
from kernels.whole_rows import whole_rows


class Backward(NamedTuple):
    """How the way back is launched."""

    programs: int
    """Per processor, at 256 threads each."""
    ahead: int
    """Tiles of 16-bit elements that are fetched before their turn; half as many of 32 bits."""


BACKWARD = {80: Backward(2, 2), 90: Backward(2, 3), 100: Backward(2, 1)}  # 80: fits the 99 KiB of sm_86 and sm_89 too
TILE = 2048
"""Elements of each tensor that a program holds at once, more only where a row is longer."""
THREAD = 16
"""Of these, each thread's."""


@triton.jit(do_not_specialize=["num_rows"])  # the batch size recompiles nothing
def _forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, num_rows, num_columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    row = rows[:, None]  # [ROWS, 1]
    inside = (row < num_rows) & (columns < num_columns)  # [ROWS, BLOCK]
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * num_columns + columns, total, mask=inside)
        x = total.to(tl.float32)  # what is normalized is what the residual stream carries on, rounded
    if mean_ptr is not None:
        mean = tl.sum(x, 1) / num_columns  # [ROWS]
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / num_columns + eps)  # [ROWS]
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)  # [1, BLOCK]
    y = x * rstd[:, None] * weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    dy_stride, dtotal_stride, x_stride, num_rows, num_columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    # again for each row: a tile of the shape of the others, whose layout else gave way to one of single columns
    every_row = columns + tl.zeros((ROWS, 1), tl.int32)  # [ROWS, BLOCK]
    weight = tl.load(weight_ptr + every_row, mask=every_row < num_columns, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
        row = rows[:, None]  # [ROWS, 1]
        inside = (row < num_rows) & (columns < num_columns)  # [ROWS, BLOCK]
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]  # [ROWS, 1]
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]  # meets dy = 0 outside
        normalized = x * rstd
        dweight += dy * normalized
        scaled = dy * weight
        shared = normalized * (tl.sum(scaled * normalized, 1) / num_columns)[:, None]
        if mean_ptr is not None:
            shared += (tl.sum(scaled, 1) / num_columns)[:, None]
        if dbias_ptr is not None:
            dbias += dy
        dx = rstd * (scaled - shared)
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row * dtotal_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * num_columns + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    # a partial row per program, summed by the host in a fixed order: the same bits on every run, unlike atomics
    partial = program * num_columns + columns
    tl.store(dweight_ptr + partial, tl.sum(dweight, 0)[None, :], mask=columns < num_columns)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0)[None, :], mask=columns < num_columns)


def norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalized rows [N, D], their sums before that [N, D], and each row's mean and factor [N] in float32.

    Args:
        x: Activations [N, D]; rows may lie apart, their elements may not.
        residual: Added to `x` first [N, D]; None = nothing, and the sums returned are empty.
        weight: Scale of each column [D].
        bias: Added to each column at last [D].
        eps: Added to the mean square, or the variance, before its root.
        centered: The mean is subtracted (layer norm); else the means returned are empty.
    """
    num_rows, num_columns = x.shape
    x = whole_rows(x)
    y = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else y.new_empty(0)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centered else rstd.new_empty(0)
    if num_rows:
        residual = None if residual is None else whole_rows(residual)
        rows, block, warps = _tile(num_columns)
        _forward[(triton.cdiv(num_rows, rows),)](
            x, residual, weight.contiguous(), None if bias is None else bias.contiguous(), y,
            None if residual is None else total, mean if centered else None, rstd,
            x.stride(0), 0 if residual is None else residual.stride(0), num_rows, num_columns, eps,
            ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, total, mean, rstd


def norm_bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalized [N, D], of weight [D] and bias [D], each in the dtype of what it belongs to.

    Args:
        dy: Gradient of the normalized rows [N, D].
        dtotal: Gradient of the sums [N, D]; None = there were none.
        x: What was normalized [N, D].
        weight: Scale of each column [D].
        mean: Mean of each row [N], from `norm_fwd`; empty for RMS norm.
        rstd: Factor of each row [N], from `norm_fwd`.
        biased: There was a bias; else its gradient is empty.
    """
    num_rows, num_columns = x.shape
    dy, x = whole_rows(dy), whole_rows(x)
    dtotal = None if dtotal is None else whole_rows(dtotal)
    rows, block, warps = _tile(num_columns)
    launch = constants(BACKWARD, x.device)
    num_programs = min(triton.cdiv(num_rows, rows), max(1, launch.programs * 8 // warps) * processors(x.device))
    dx = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    dweight = torch.empty((num_programs, num_columns), dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight) if biased else dweight.new_empty(0)
    if num_rows:
        _backward[(num_programs,)](
            dy, dtotal, x, weight.contiguous(), mean if mean.numel() else None, rstd, dx, dweight,
            dbias if biased else None, dy.stride(0), 0 if dtotal is None else dtotal.stride(0), x.stride(0),
            num_rows, num_columns, ROWS=rows, BLOCK=block, STAGES=1 + launch.ahead * 2 // x.element_size(),
            num_warps=warps,
        )  # fmt: skip
    dbias = dbias.sum(0) if biased else dbias
    return dx, dweight.sum(0).to(weight.dtype), dbias.to(weight.dtype)


def _tile(num_columns: int) -> tuple[int, int, int]:
    """Rows and columns that a program holds at once, and its warps."""
    block = triton.next_power_of_2(num_columns)
    rows = max(1, TILE // block)
    return rows, block, max(4, min(16, rows * block // (32 * THREAD)))
