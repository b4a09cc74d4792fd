"""Quantization to 8 bits as registered operations; kernels and launches are in `kernels.quantize_triton`.

For inference: nothing here has a gradient.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.reference import FP8, INT8, LARGEST_CODE
from kernels.registration import register

MAX_GROUP = 32768
"""Longest group, or row, that a kernel holds in registers."""


def _quantize_fake(x: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return x.new_empty((rows, columns), dtype=dtype), x.new_empty((rows, columns // group_size), dtype=torch.float32)


def _dequantize_fake(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


_MODULE = "kernels.quantize_triton"
_quantize = register(
    "quantize(Tensor x, int group_size, ScalarType dtype) -> (Tensor, Tensor)", _MODULE, _quantize_fake
)
_dequantize = register("dequantize(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor", _MODULE, _dequantize_fake)


def quantize_groups(
    x: Tensor, group_size: int, dtype: torch.dtype = INT8, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Codes of the rows of `x` and the scale of each group of columns: x = codes * scale, to half a step.

    A group's scale is its largest magnitude / 127 (int8, -128 unused) or / 448 (E4M3); codes are the nearest, ties to
    even. Zero is code 0, so that rows of zeros stay zeros. A NaN or an infinity makes the scale of its group so, and
    with it all that is computed from it.

    Args:
        x: Numbers [..., K].
        group_size: Columns of a group, G; divides K.
        dtype: torch.int8 or torch.float8_e4m3fn.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Codes [..., K] and scales [..., K / G] in float32 (float64 for float64 numbers).

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: `group_size` does not divide the row, or `dtype` is none of the two.
    """
    columns = x.shape[-1]
    if dtype not in LARGEST_CODE:
        raise ValueError(f"dtype={dtype} is not one of {', '.join(map(str, LARGEST_CODE))}")
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group_size={group_size} does not divide rows of {columns} columns")
    x = x.detach()
    if not runs_kernel(kernels, x, group_size, MAX_GROUP, fp8=dtype == FP8):
        return reference.quantize_groups(x, group_size, dtype)
    codes, scales = _quantize(x.reshape(-1, columns), group_size, dtype)
    return codes.view(x.shape), scales.view(*x.shape[:-1], columns // group_size)


def quantize_rows(x: Tensor, dtype: torch.dtype = INT8, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """Codes of the rows of `x` and the scale of each row: `quantize_groups` where a row is one group.

    A row's scale comes from that row alone, so that no result depends on what shares its batch.

    Args:
        x: Numbers [..., K].
        dtype: torch.int8 or torch.float8_e4m3fn.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Codes [..., K] and scales [..., 1] in float32 (float64 for float64 numbers).

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: `dtype` is none of the two.
    """
    return quantize_groups(x, x.shape[-1], dtype, kernels)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, kernels: str = "auto") -> Tensor:
    """What codes stand for: each times the scale of its group.

    Args:
        codes: int8 or E4M3 [..., K].
        scales: Scale of each group of columns [..., K / G]; what `quantize_rows` or `quantize_groups` gave.
        dtype: Of the result.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Numbers [..., K], rounded once.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: The scales do not fit the codes.
    """
    columns, groups = codes.shape[-1], scales.shape[-1]
    if codes.shape[:-1] != scales.shape[:-1] or not groups or columns % groups:
        raise ValueError(f"scales have shape {list(scales.shape)}, which fits no codes of shape {list(codes.shape)}")
    takes_codes = runs_kernel(kernels, codes, columns // groups, MAX_GROUP, tuple(LARGEST_CODE), codes.dtype == FP8)
    if not (takes_codes and runs_kernel(kernels, scales, 1)):
        return reference.dequantize(codes, scales, dtype)
    y: Tensor = _dequantize(codes.reshape(-1, columns), scales.reshape(-1, groups), dtype)
    return y.view(codes.shape)
