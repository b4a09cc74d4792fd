"""Products of 8-bit codes, from a few tokens to many; `dtype` is that of the codes, results are bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.reference import FP8, INT8
from kernels.w8a8_linear import w8a8_linear
from kernels.workloads import Cost, Sizes, Workload

_CHANNELS, _COLUMNS = 8192, 8192


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    def codes(rows: int) -> Tensor:
        return (30 * torch.randn(rows, sizes["columns"], device=device)).clamp(-127, 127).to(dtype)

    def scales(*size: int) -> Tensor:
        return torch.exp2(torch.randint(-9, -5, size, device=device))

    x, weight = codes(sizes["rows"]), codes(sizes["channels"])
    x_scale, weight_scale = scales(sizes["rows"], 1), scales(sizes["channels"])
    return {
        "x": x,
        "weight": weight,
        "x_scale": x_scale,
        "weight_scale": weight_scale,
        "dense_x": (x.float() * x_scale).bfloat16(),  # exactly, as scales are powers of two
        "dense_weight": (weight.float() * weight_scale[:, None]).bfloat16(),
    }


def _kernel(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, **dense: Tensor) -> Tensor:
    return w8a8_linear(x, weight, x_scale, weight_scale, kernels="triton")


def _plain(dense_x: Tensor, dense_weight: Tensor, **codes: Tensor) -> Tensor:
    return torch.nn.functional.linear(dense_x, dense_weight)


def _scaled_mm(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, **dense: Tensor) -> Tensor:
    return torch._scaled_mm(x, weight.t(), x_scale, weight_scale[None], out_dtype=torch.bfloat16)


def _int_mm(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, **dense: Tensor) -> Tensor:
    return (torch._int_mm(x, weight.t()) * weight_scale * x_scale).bfloat16()


_RIVALS: dict[torch.dtype, dict[str, Callable[..., Tensor]]] = {
    INT8: {"torch._int_mm, scaled": _int_mm},
    FP8: {"torch._scaled_mm": _scaled_mm},
}


def _workload(rows: int, small_rows: int, codes: torch.dtype) -> Workload:
    def cost(sizes: Sizes) -> Cost:
        rows, channels, columns = sizes["rows"], sizes["channels"], sizes["columns"]
        return Cost((rows + channels) * columns + 2 * rows * channels, 2 * rows * channels * columns)

    return Workload(
        op="w8a8_linear",
        dtype=codes,
        sizes={"rows": rows, "channels": _CHANNELS, "columns": _COLUMNS},
        small={"rows": small_rows, "channels": 256, "columns": 1024},
        inputs=_inputs,
        kernel=_kernel,
        plain=_plain,
        forward=cost,
        rivals=_RIVALS[codes],
    )


WORKLOADS = [
    _workload(rows, small_rows, codes)
    for codes in (INT8, FP8)
    for rows, small_rows in ((16, 16), (64, 64), (512, 100), (8192, 300))
    if (codes, rows) != (FP8, 512)  # as 8192
]
