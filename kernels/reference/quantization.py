"""Codes of few bits, and products with them."""

import torch
from torch import Tensor

from kernels.int4_layout import SYMMETRIC_ZERO, unpack

INT8, FP8 = torch.int8, torch.float8_e4m3fn
LARGEST_CODE = {INT8: 127.0, FP8: 448.0}
"""int8: -128 stays unused, so that codes are symmetric; E4M3: its largest number (arXiv:2209.05433)."""
SMALLEST_MAGNITUDE = 1e-30
"""Rows and groups that are closer to zero count as zero: their scale must not be zero, nor its inverse infinite."""


def quantize_groups(x: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of the rows of `x` and the scale of each group of columns; see `kernels.quantize`.

    Args:
        x: Numbers [..., K].
        group_size: Columns of a group, G.
        dtype: `INT8` or `FP8`.

    Returns:
        Codes [..., K] and scales [..., K / G].
    """
    groups = torch.unflatten(x, -1, (x.shape[-1] // group_size, group_size))
    wide = groups.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_MAGNITUDE)
    limit = torch.full_like(largest, LARGEST_CODE[dtype])  # dividing by a number, torch multiplies with its inverse
    steps = wide * (limit / largest)
    steps = (steps.round() if dtype == INT8 else steps).clamp(-LARGEST_CODE[dtype], LARGEST_CODE[dtype])
    return steps.flatten(-2).to(dtype), (largest / limit).squeeze(-1)  # E4M3 has no shape operations in ONNX


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes stand for.

    Args:
        codes: int8 or E4M3 [..., K].
        scales: Scale of each group of columns [..., K / G].
        dtype: Of the result.

    Returns:
        Numbers [..., K].
    """
    groups = torch.unflatten(codes, -1, (scales.shape[-1], codes.shape[-1] // scales.shape[-1]))
    return (groups.to(scales.dtype) * scales[..., None]).flatten(-2).to(dtype)


def w8a8_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Scaled products of 8-bit codes; see `kernels.w8a8_linear`.

    Args:
        x: int8 or E4M3 [..., K].
        weight: Of the same kind [N, K].
        x_scale: Scale of each row [..., 1]; float64 scales make everything so.
        weight_scale: Scale of each channel [N].
        bias: [N].
        dtype: Of the result [..., N].
    """
    wide = torch.promote_types(x_scale.dtype, torch.float32)
    if x.dtype == INT8:
        sums = int8_product(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0]).to(wide)
    else:
        sums = x.to(wide) @ weight.to(wide).t()
    y = sums * weight_scale.to(wide) * x_scale
    return (y if bias is None else y + bias).to(dtype)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """`a` [M, K] times the transpose of `b` [N, K], both int8, as exact int32 sums [M, N].

    On CUDA torch's integer kernel takes more than 16 rows and multiples of 8 only; float64, whose sums of such products
    are exact up to 2^53, does the rest.
    """
    (rows, columns), channels = a.shape, b.shape[0]
    if a.is_cuda and (rows <= 16 or columns % 8 or channels % 8):
        return (a.double() @ b.double().t()).to(torch.int32)
    return torch._int_mm(a, b.t())


def w4a16_linear(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """Linear layer of 4-bit weights; see `kernels.w4a16_linear`.

    Args:
        x: Activations [..., K].
        packed: Codes in the layout of `kernels.int4_layout`, int16.
        scales: Scale of each group of columns and channel [K / G, N].
        zeros: Code that stands for zero, uint8 [K / G, N]; None = 8.
        bias: [N].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    group_size = x.shape[-1] // scales.shape[0]
    codes = torch.unflatten(unpack(packed, x.shape[-1]), 1, (-1, group_size)).to(wide)  # [N, K / G, G]
    centred = codes - (SYMMETRIC_ZERO if zeros is None else zeros.t().to(wide)[..., None])
    weight = (centred * scales.t().to(wide)[..., None]).flatten(1)
    y = x.to(wide) @ weight.t()
    return (y if bias is None else y + bias).to(x.dtype)
