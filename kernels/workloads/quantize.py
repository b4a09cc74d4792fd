"""Quantization to 8 bits: rows of activations, groups of weights, and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import KernelError
from kernels.quantize import dequantize, quantize_groups, quantize_rows
from kernels.reference import FP8, INT8, LARGEST_CODE
from kernels.workloads import Cost, Sizes, Workload

GROUP = 128


def _plain(x: Tensor, dtype: torch.dtype, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    grouped = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    scales = grouped.abs().amax(-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32)) / LARGEST_CODE[dtype]
    steps = grouped / scales
    return (steps.round() if dtype == INT8 else steps).to(dtype).flatten(-2), scales.squeeze(-1)


def _judge(results: Any, plain: Any, truth: Any) -> None:
    """Codes are those of the reference but for the last place of a scale, which moves few of them by one step."""
    codes, scales = (tensor.double() for tensor in results)
    true_codes, true_scales = (tensor.double() for tensor in truth)
    assert ((scales - true_scales).abs() <= 2**-20 * true_scales).all(), "a scale is wrong"
    apart = (codes - true_codes).abs()
    step = 1 if results[0].dtype == INT8 else 2**-3 * true_codes.abs() + 2**-9
    assert (apart <= step).all(), f"a code is {apart.max():g} away"
    assert (apart > 0).double().mean() < 0.01, "more codes differ than rounding explains"


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {"x": torch.randn(sizes["rows"], sizes["columns"], device=device, dtype=dtype)}


def _quantizing(call: Callable[..., Any], columns: int, codes: torch.dtype, group_size: int | None) -> Workload:
    options = {"dtype": codes} if group_size is None else {"dtype": codes, "group_size": group_size}
    bits = {"group": group_size or columns, "bits8": 0 if codes == INT8 else 1}

    def forward(sizes: Sizes) -> Cost:
        numbers = sizes["rows"] * sizes["columns"]
        return Cost(3 * numbers + 4 * numbers // (group_size or sizes["columns"]))

    return Workload(
        op=call.__name__,
        dtype=torch.bfloat16,
        sizes={"rows": 16384, "columns": columns, **bits},
        small={"rows": 64, "columns": columns, **bits},
        inputs=_inputs,
        kernel=partial(call, **options, kernels="triton"),
        plain=partial(_plain, **options),
        forward=forward,
        judge=_judge,
    )
