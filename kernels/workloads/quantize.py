"""Quantization to 8 bits of bfloat16 rows and groups, and back; `dtype` is that of the codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.quantize import dequantize, quantize_groups, quantize_rows
from kernels.reference import FP8, INT8, LARGEST_CODE
from kernels.workloads import Cost, Sizes, Workload

_GROUP = 128


def _numbers(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {"x": torch.randn(sizes["rows"], sizes["columns"], device=device, dtype=torch.bfloat16)}


def _codes(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    rows, columns = sizes["rows"], sizes["columns"]
    codes = (40 * torch.randn(rows, columns, device=device)).clamp(-127, 127).to(dtype)
    return {"codes": codes, "scales": torch.rand(rows, columns // _GROUP, device=device)}


def _plain_quantize(x: Tensor, codes: torch.dtype, group_size: int | None) -> tuple[Tensor, Tensor]:
    groups = torch.unflatten(x, -1, (-1, group_size or x.shape[-1])).to(torch.promote_types(x.dtype, torch.float32))
    scales = groups.abs().amax(-1, keepdim=True) / LARGEST_CODE[codes]
    steps = groups / scales
    return (steps.round() if codes == INT8 else steps).to(codes).flatten(-2), scales.squeeze(-1)


def _plain_dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    wide = torch.promote_types(scales.dtype, torch.float32)
    y = (torch.unflatten(codes.to(wide), -1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)
    return y if wide == torch.float64 else y.to(torch.bfloat16)


def _judge(actual: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Rounding may move what is almost half-way between two codes, by one step."""
    codes, scales, true_codes, true_scales = (tensor.double() for tensor in (*actual, *truth))
    assert ((scales - true_scales).abs() <= torch.finfo(torch.float32).eps * true_scales).all(), "a scale is wrong"
    apart = (codes - true_codes).abs()
    step = 1.0 if actual[0].dtype == INT8 else true_codes.abs() / 8 + 2.0**-9
    assert (apart <= step).all(), f"a code is {apart.max():g} from where it should be"
    assert (apart > 0).double().mean() < 1e-3, "more codes than rounding explains are elsewhere"


def _quantizing(call: Callable[..., Any], columns: int, codes: torch.dtype, group_size: int | None) -> Workload:
    def cost(sizes: Sizes) -> Cost:
        numbers = sizes["rows"] * sizes["columns"]
        return Cost(3 * numbers + 4 * numbers // (group_size or sizes["columns"]))

    options = {} if group_size is None else {"group_size": group_size}
    return Workload(
        op=call.__name__,
        dtype=codes,
        sizes={"rows": 16384, "columns": columns},
        small={"rows": 64, "columns": columns},
        inputs=_numbers,
        kernel=partial(call, dtype=codes, kernels="triton", **options),
        plain=partial(_plain_quantize, codes=codes, group_size=group_size),
        forward=cost,
        judge=_judge,
    )


def _dequantizing(codes: torch.dtype) -> Workload:
    def cost(sizes: Sizes) -> Cost:
        numbers = sizes["rows"] * sizes["columns"]
        return Cost(3 * numbers + 4 * numbers // _GROUP)

    return Workload(
        op="dequantize",
        dtype=codes,
        sizes={"rows": 16384, "columns": 4096},
        small={"rows": 64, "columns": 4096},
        inputs=_codes,
        kernel=partial(dequantize, dtype=torch.bfloat16, kernels="triton"),
        plain=_plain_dequantize,
        forward=cost,
    )


WORKLOADS = [
    workload
    for codes in (INT8, FP8)
    for workload in (
        _quantizing(quantize_rows, 4096, codes, None),
        _quantizing(quantize_rows, 14336, codes, None),
        _quantizing(quantize_groups, 4096, codes, _GROUP),
        _dequantizing(codes),
    )
]
