"""Linear layers of 4-bit weights, from a few tokens to many, beside the library's product of 16-bit weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.int4_layout import SYMMETRIC_ZERO, pack
from kernels.w4a16_linear import w4a16_linear
from kernels.workloads import Cost, Sizes, Workload

_CHANNELS, _COLUMNS = 8192, 8192


def _workload(
    rows: int, small_rows: int, group_size: int = 128, symmetric: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Workload:
    def inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        channels, columns = sizes["channels"], sizes["columns"]
        groups = columns // group_size
        codes = torch.randint(0, 16, (channels, columns), device=device, dtype=torch.uint8)
        scales = torch.exp2(torch.randint(-9, -5, (groups, channels), device=device)).to(dtype)
        zeros = torch.randint(0, 16, (groups, channels), device=device, dtype=torch.uint8)
        centred = torch.unflatten(codes, 1, (groups, group_size)).to(dtype) - (
            SYMMETRIC_ZERO if symmetric else zeros.t()[..., None]
        )
        return {
            "x": torch.randn(sizes["rows"], columns, device=device, dtype=dtype),
            "packed": pack(codes),
            "scales": scales,
            "zeros": None if symmetric else zeros,
            "dense": (centred * scales.t()[..., None]).flatten(1),  # exactly, as scales are powers of two
        }

    def cost(sizes: Sizes) -> Cost:
        rows, channels, columns = sizes["rows"], sizes["channels"], sizes["columns"]
        of_group = 2 if symmetric else 3  # bytes of a scale, and of a zero point
        weights = channels * columns // 2 + of_group * channels * columns // group_size
        return Cost(weights + 2 * rows * (channels + columns), 2 * rows * channels * columns)

    return Workload(
        op="w4a16_linear",
        dtype=dtype,
        sizes={"rows": rows, "channels": _CHANNELS, "columns": _COLUMNS, "group": group_size},
        small={"rows": small_rows, "channels": 256, "columns": 1024, "group": group_size},
        inputs=inputs,
        kernel=_kernel,
        plain=_plain,
        forward=cost,
    )


def _kernel(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, dense: Tensor) -> Tensor:
    return w4a16_linear(x, packed, scales, zeros, kernels="triton")


def _plain(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, dense: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, dense)


WORKLOADS = [
    _workload(16, 16, symmetric=True),
    _workload(16, 16, group_size=64),
    _workload(16, 16, group_size=32),
    _workload(64, 64),
    _workload(512, 100),
    _workload(8192, 600),
    _workload(1, 1, dtype=torch.float16),
    _workload(4096, 600, dtype=torch.float16),
]
"""Groups of 128 with zero points, but for the few that say otherwise."""
