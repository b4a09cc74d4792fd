"""RMS norm: a common, an odd and the largest width."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import DTYPES, MAX_COLUMNS
from kernels.rms_norm import rms_norm
from kernels.workloads import Cost, Sizes, Workload


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    rows, columns = sizes["rows"], sizes["columns"]
    x = torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(columns, device=device, dtype=dtype, requires_grad=True)
    return {"x": x, "weight": weight, "eps": 1e-5}


def _plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def _workload(columns: int, dtype: torch.dtype) -> Workload:
    def forward(sizes: Sizes) -> Cost:
        return Cost(2 * sizes["rows"] * sizes["columns"] * dtype.itemsize)

    def backward(sizes: Sizes) -> Cost:
        return Cost(3 * sizes["rows"] * sizes["columns"] * dtype.itemsize)

    return Workload(
        op="rms_norm",
        dtype=dtype,
        sizes={"rows": 16384, "columns": columns},
        small={"rows": 64, "columns": columns},
        inputs=_inputs,
        kernel=partial(rms_norm, kernels="triton"),
        plain=_plain,
        forward=forward,
        backward=backward,
    )


WORKLOADS = [_workload(columns, dtype) for columns in (256, 1000, 4096, MAX_COLUMNS) for dtype in DTYPES]
