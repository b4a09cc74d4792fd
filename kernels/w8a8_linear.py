"""Products of 8-bit codes as a registered operation; kernels and launches are in `kernels.w8a8_linear_triton`.

For inference: nothing here has a gradient.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.reference import FP8, INT8, LARGEST_CODE
from kernels.registration import register

MAX_INT8_COLUMNS = (2**31 - 1) // 127**2
"""Longest row whose sum of products of codes is sure to fit int32."""


def _fake(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


_linear = register(
    "w8a8_linear(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor",
    "kernels.w8a8_linear_triton",
    _fake,
)


def w8a8_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernels: str = "auto",
) -> Tensor:
    """Linear layer of activations and weights in 8 bits: y[m, n] = x_scale[m] weight_scale[n] sum_k x[m, k] w[n, k].

    Sums are exact in int32 for int8, and float32 for E4M3. What `kernels.quantize.quantize_rows` gives for activations
    and for a weight fits here.

    Args:
        x: Codes of the activations, int8 or E4M3 [..., K].
        weight: Codes of the weights, of the same kind [N, K].
        x_scale: Scale of each row, float32 [..., 1].
        weight_scale: Scale of each output channel, float32 [N].
        bias: Added to each channel [N].
        dtype: Of the result.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Results [..., N] in `dtype`, rounded once.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: Shapes or kinds do not fit, or K is so large that int32 might overflow.
    """
    columns, channels = x.shape[-1], weight.shape[0]
    if x.dtype not in LARGEST_CODE or weight.dtype != x.dtype:
        raise ValueError(f"codes are {x.dtype} and {weight.dtype}; both must be torch.int8 or both torch.float8_e4m3fn")
    if weight.shape != (channels, columns) or x_scale.shape != (*x.shape[:-1], 1) or weight_scale.shape != (channels,):
        raise ValueError(
            f"weight {list(weight.shape)}, x_scale {list(x_scale.shape)} and weight_scale {list(weight_scale.shape)} "
            f"do not fit x {list(x.shape)}; it needs [N, {columns}], {[*x.shape[:-1], 1]} and [N]"
        )
    if x.dtype == INT8 and columns > MAX_INT8_COLUMNS:
        raise ValueError(f"rows of {columns} int8 codes may overflow int32; {MAX_INT8_COLUMNS} columns are safe")
    takes_codes = runs_kernel(kernels, x, 1, dtypes=tuple(LARGEST_CODE), fp8=x.dtype == FP8)
    if not (takes_codes and runs_kernel(kernels, x_scale, 1)):
        return reference.w8a8_linear(x, weight, x_scale, weight_scale, bias, dtype)
    y: Tensor = _linear(x.reshape(-1, columns), weight, x_scale.reshape(-1), weight_scale, bias, dtype)
    return y.view(*x.shape[:-1], channels)
