# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Gated linear units in the Triton language: kernels and the functions that launch them (see `kernels.glu`).

Bytes are all that counts: each element is moved once, 16 bytes at a time, and the way back computes the activation
again instead of reading it. Rows may lie apart, as halves of one projection do, at no cost.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_constants import constants
from kernels.whole_rows import whole_rows


class Tile(NamedTuple):
    """What a program takes."""

    elements: int
    """Of each tensor."""
    warps: int


FORWARD = {80: Tile(2048, 4), 90: Tile(2048, 4), 100: Tile(2048, 4)}
BACKWARD = {80: Tile(1024, 4), 90: Tile(1024, 4), 100: Tile(1024, 4)}


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """The activation of x and its derivative."""
    if KIND == "silu":
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
    if KIND == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        sigmoid = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid) * slope)
    below = 0.5 * (1.0 + tl.erf(0.7071067811865476 * x))  # of a normal distribution; 1 / sqrt(2)
    return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)


@triton.jit
def _elements(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, COLUMNS] of this program, and which of them there are; a row's tiles in order."""
    tiles = tl.cdiv(num_columns, COLUMNS)
    program = tl.program_id(0)
    rows = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows, columns, (rows < num_rows) & (columns < num_columns)


@triton.jit(do_not_specialize=["num_rows"])  # the batch size recompiles nothing
def _forward(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, num_rows, num_columns,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, inside = _elements(num_rows, num_columns, ROWS, COLUMNS)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
    up = tl.load(up_ptr + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
    active, _ = _activation(gate, KIND)
    tl.store(y_ptr + rows * num_columns + columns, (active * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_stride, gate_stride, up_stride, num_rows, num_columns,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, inside = _elements(num_rows, num_columns, ROWS, COLUMNS)
    dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
    up = tl.load(up_ptr + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
    active, slope = _activation(gate, KIND)
    where = rows * num_columns + columns
    tl.store(dgate_ptr + where, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + where, (dy * active).to(dup_ptr.dtype.element_ty), mask=inside)


def glu_fwd(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """activation(gate) * up [N, F] in the dtype of `gate`.

    Args:
        gate: What the activation is taken of [N, F]; rows may lie apart, their elements may not.
        up: What is gated [N, F].
        kind: `silu`, `gelu` or `gelu_tanh`.
    """
    gate, up = whole_rows(gate), whole_rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        tile = constants(FORWARD, gate.device)
        rows, columns, programs = _shape(gate, tile.elements)
        _forward[(programs,)](
            gate, up, y, gate.stride(0), up.stride(0), *gate.shape,
            KIND=kind, ROWS=rows, COLUMNS=columns, num_warps=tile.warps,
        )  # fmt: skip
    return y


def glu_bwd(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` and `up` [N, F], each in the dtype of what it belongs to.

    Args:
        dy: Gradient of the output [N, F].
        gate: As in the forward pass [N, F].
        up: As in the forward pass [N, F].
        kind: `silu`, `gelu` or `gelu_tanh`.
    """
    dy, gate, up = whole_rows(dy), whole_rows(gate), whole_rows(up)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if dgate.numel():
        tile = constants(BACKWARD, gate.device)
        rows, columns, programs = _shape(gate, tile.elements)
        _backward[(programs,)](
            dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0), *gate.shape,
            KIND=kind, ROWS=rows, COLUMNS=columns, num_warps=tile.warps,
        )  # fmt: skip
    return dgate, dup


def _shape(x: Tensor, elements: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and how many programs there are."""
    num_rows, num_columns = x.shape
    columns = min(elements, triton.next_power_of_2(num_columns))
    rows = elements // columns
    return rows, columns, triton.cdiv(num_rows, rows) * triton.cdiv(num_columns, columns)
