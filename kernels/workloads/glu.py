"""Gated linear units at the widths of a Llama and of a smaller model's feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import DTYPES
from kernels.glu import geglu, swiglu
from kernels.workloads import Call, Cost, Sizes, Workload, liger


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    shape = sizes["rows"], sizes["columns"]
    return {name: torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for name in ("gate", "up")}


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return F.gelu(gate, approximate=approximate) * up


def _workload(
    op: str,
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    columns: int,
    dtype: torch.dtype,
    kind: str = "",
    rivals: dict[str, Call] | None = None,
) -> Workload:
    def forward(sizes: Sizes) -> Cost:
        return Cost(3 * sizes["rows"] * sizes["columns"] * dtype.itemsize)

    def backward(sizes: Sizes) -> Cost:
        return Cost(5 * sizes["rows"] * sizes["columns"] * dtype.itemsize)

    return Workload(
        op=op,
        kind=kind,
        dtype=dtype,
        sizes={"rows": 16384, "columns": columns},
        small={"rows": 8, "columns": columns},
        inputs=_inputs,
        kernel=partial(kernel, kernels="triton"),
        plain=plain,
        forward=forward,
        backward=backward,
        rivals=rivals or {},
    )


_LIGER_SWIGLU = liger(lambda theirs: lambda gate, up: theirs.liger_swiglu(gate, up))
_LIGER_GEGLU = {"tanh": liger(lambda theirs: lambda gate, up: theirs.liger_geglu(gate, up)), "none": {}}
WORKLOADS = [
    *(
        _workload("swiglu", swiglu, _swiglu, columns, dtype, rivals=_LIGER_SWIGLU)
        for columns in (14336, 688)
        for dtype in DTYPES
    ),
    *(
        _workload(
            "geglu",
            partial(geglu, approximate=approximate),
            partial(_geglu, approximate=approximate),
            14336,
            torch.bfloat16,
            kind=approximate,
            rivals=_LIGER_GEGLU[approximate],
        )
        for approximate in ("tanh", "none")
    ),
]
