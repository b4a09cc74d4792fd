"""Norms: with a residual stream as a decoder's layers run them; alone as its queries, keys and last layer do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import norm
from kernels.dispatch import DTYPES, MAX_COLUMNS
from kernels.workloads import Call, Cost, Sizes, Workload, liger

_BF16 = (torch.bfloat16,)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps), total


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total


_LIGER: dict[str, Callable[[Any], Call]] = {
    "rms_norm": lambda theirs: lambda x, weight, eps: theirs.liger_rms_norm(x, weight, eps, in_place=False),
    "add_rms_norm": lambda theirs: (
        lambda x, residual, weight, eps: theirs.liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)
    ),
    "layer_norm": lambda theirs: lambda x, weight, bias, eps: theirs.liger_layer_norm(x, weight, bias, eps),
}


def _workload(op: str, plain: Callable[..., Any], rows: int, columns: int, dtype: torch.dtype) -> Workload:
    adds, centered = op.startswith("add"), op.endswith("layer_norm")

    def inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        rows, columns = sizes["rows"], sizes["columns"]
        made: dict[str, Any] = {"x": torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True)}
        if adds:
            made["residual"] = torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True)
        made["weight"] = torch.ones(columns, device=device, dtype=dtype, requires_grad=True)
        if centered:
            made["bias"] = torch.zeros(columns, device=device, dtype=dtype, requires_grad=True)
        return {**made, "eps": 1e-5}

    def forward(sizes: Sizes) -> Cost:
        return Cost((4 if adds else 2) * sizes["rows"] * sizes["columns"] * dtype.itemsize)

    def backward(sizes: Sizes) -> Cost:
        return Cost((4 if adds else 3) * sizes["rows"] * sizes["columns"] * dtype.itemsize)

    return Workload(
        op=op,
        dtype=dtype,
        sizes={"rows": rows, "columns": columns},
        small={"rows": 64, "columns": columns},
        inputs=inputs,
        kernel=partial(getattr(norm, op), kernels="triton"),
        plain=plain,
        forward=forward,
        backward=backward,
        rivals=liger(_LIGER[op]) if op in _LIGER else {},
    )


WORKLOADS = [
    _workload(op, plain, rows, columns, dtype)
    for op, plain, sizes, dtypes in (
        ("rms_norm", _rms_norm, ((1 << 19, 128), (16384, 1000), (16384, 4096)), _BF16),
        ("add_rms_norm", _add_rms_norm, ((16384, 1000), (16384, 4096), (8192, MAX_COLUMNS)), DTYPES),
        ("layer_norm", _layer_norm, ((16384, 4096),), _BF16),
        ("add_layer_norm", _add_layer_norm, ((16384, 4096), (8192, MAX_COLUMNS)), (torch.float32, torch.bfloat16)),
    )
    for rows, columns in sizes
    for dtype in dtypes
]
