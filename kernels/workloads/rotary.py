"""Rotary positions of a Llama's heads, of narrower ones and of heads whose halves are no power of two."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import DTYPES
from kernels.rotary import rotary
from kernels.workloads import Cost, Sizes, Workload, liger


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Projections as a model looks at them, and angles of one sequence; not leaves, which must not be overwritten."""
    batch, length, width = sizes["batch"], sizes["length"], sizes["width"]

    def heads(number: int) -> Tensor:
        x = torch.randn(batch, length, number * width, device=device, dtype=dtype, requires_grad=True)
        return x.view(batch, length, number, width).transpose(1, 2).clone()  # keeps the strides

    angles = torch.arange(length, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, width // 2, device=device)
    angles = torch.cat((angles, angles), dim=-1)[None, None]
    return {"q": heads(sizes["q_heads"]), "k": heads(sizes["k_heads"]), "cos": angles.cos(), "sin": angles.sin()}


def _plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)

    return turned(q), turned(k)


def _workload(q_heads: int, k_heads: int, width: int, dtype: torch.dtype) -> Workload:
    def cost(sizes: Sizes) -> Cost:
        heads = sizes["q_heads"] + sizes["k_heads"]
        turned = 2 * dtype.itemsize * sizes["batch"] * sizes["length"] * heads * sizes["width"]
        return Cost(turned + 2 * 4 * sizes["length"] * sizes["width"] // 2)

    sizes = {"batch": 4, "length": 4096, "q_heads": q_heads, "k_heads": k_heads, "width": width}
    return Workload(
        op="rotary",
        dtype=dtype,
        sizes=sizes,
        small={**sizes, "batch": 1, "length": 4},
        inputs=_inputs,
        kernel=partial(rotary, kernels="triton"),
        plain=_plain,
        forward=cost,
        backward=cost,
        rivals=liger(lambda theirs: lambda q, k, cos, sin: theirs.liger_rope(q, k, cos[:, 0], sin[:, 0])),
    )


WORKLOADS = [
    *(_workload(32, 8, 128, dtype) for dtype in DTYPES),
    _workload(14, 2, 64, torch.bfloat16),
    _workload(32, 32, 96, torch.bfloat16),
]
