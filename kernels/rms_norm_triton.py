# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""RMS norm in the Triton language: kernels and the functions that launch them (registered in `kernels.rms_norm`).

A program holds whole rows in registers, so that each element is read once and written once; rows of up to
`kernels.dispatch.MAX_COLUMNS` fit without spilling (`python -m kernels.check`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_constants import processors


@triton.jit
def _forward(x_ptr, weight_ptr, y_ptr, rstd_ptr, row_stride, num_columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / num_columns + eps)
    tl.store(rstd_ptr + row, rstd)
    y = x * rstd * weight
    tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])  # the batch size recompiles nothing
def _backward(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr,
    dy_stride, x_stride, num_rows, num_columns, rows_per_program, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    dweight = tl.zeros((BLOCK,), tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, num_rows)):
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        rstd = tl.load(rstd_ptr + row)
        normalized = x * rstd
        dweight += dy * normalized
        scaled = dy * weight
        dx = rstd * (scaled - normalized * (tl.sum(scaled * normalized, 0) / num_columns))
        tl.store(dx_ptr + row * num_columns + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    # a partial row per program, summed by the host in a fixed order: the same bits on every run, unlike atomics
    tl.store(dweight_ptr + program * num_columns + columns, dweight, mask=inside)


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalized rows [N, D] in the dtype of `x`, and each row's factor [N] in float32 for the backward pass.

    Args:
        x: Activations [N, D]; rows may lie apart, their elements may not.
        weight: Scale of each column [D].
        eps: Added to the mean square before its root.
    """
    num_rows, num_columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(num_columns)
        _forward[(num_rows,)](
            x, weight.contiguous(), y, rstd, x.stride(0), num_columns, eps, BLOCK=block, num_warps=_warps(block)
        )
    return y, rstd


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of activations [N, D] and weight [D], each in the dtype of what it belongs to.

    Args:
        dy: Gradient of the output [N, D].
        x: Activations of the forward pass [N, D].
        weight: Scale of each column [D].
        rstd: Factor of each row [N], from `rms_norm_fwd`.
    """
    num_rows, num_columns = x.shape
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    rows_per_program = triton.cdiv(num_rows, 2 * processors(x.device)) if num_rows else 1
    num_programs = triton.cdiv(num_rows, rows_per_program)
    dx = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    dweight = torch.empty((num_programs, num_columns), dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(num_columns)
        _backward[(num_programs,)](
            dy, x, weight.contiguous(), rstd, dx, dweight,
            dy.stride(0), x.stride(0), num_rows, num_columns, rows_per_program, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8
