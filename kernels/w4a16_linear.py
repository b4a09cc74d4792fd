"""Linear layer of 4-bit weights as a registered operation; kernels are in `kernels.w4a16_linear_triton`.

For inference: it has no gradient, and says so where one is wanted.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.int4_layout import GROUP_SIZES, words_per_row
from kernels.registration import register

DTYPES = (torch.float16, torch.bfloat16)
"""What the kernel multiplies: its weights are exact in these."""


def _fake(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], scales.shape[1]))


_linear = register(
    "w4a16_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor",
    "kernels.w4a16_linear_triton",
    _fake,
)


def w4a16_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Linear layer of 4-bit weights with a scale for each group of columns: y = x W^T, W = (codes - zeros) scales.

    Args:
        x: Activations, float16 or bfloat16 for the kernel [..., K].
        packed: Codes in the layout of `kernels.int4_layout`, int16 [N, ceil(K / 128) * 32].
        scales: Scale of each group of columns and channel [K / G, N]; G is 32, 64 or 128. In the dtype of `x`.
        zeros: Code that stands for zero, uint8 [K / G, N]; None = 8 everywhere (symmetric).
        bias: Added to each channel [N].
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Results [..., N] in the dtype of `x`.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: Shapes or dtypes do not fit, or a gradient is wanted.
    """
    columns, (groups, channels) = x.shape[-1], scales.shape
    group_size = columns // groups
    if group_size * groups != columns or group_size not in GROUP_SIZES:
        raise ValueError(f"{groups} groups of K={columns} columns are not groups of 32, 64 or 128")
    stored = [channels, words_per_row(columns)]
    if list(packed.shape) != stored or packed.dtype != torch.int16:
        raise ValueError(
            f"packed is {packed.dtype} {list(packed.shape)}; N={channels} and K={columns} are int16 {stored}"
        )
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype != torch.uint8):
        raise ValueError(f"zeros are {zeros.dtype} {list(zeros.shape)}; the scales need uint8 {list(scales.shape)}")
    if scales.dtype != x.dtype:
        raise ValueError(f"scales are {scales.dtype}; activations in {x.dtype} need theirs")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("4-bit linear layers have no gradient. Call them within torch.no_grad().")
    if not runs_kernel(kernels, x, 1, dtypes=DTYPES):
        return reference.w4a16_linear(x, packed, scales, zeros, bias)
    y: Tensor = _linear(x.reshape(-1, columns), packed, scales, zeros, bias)
    return y.view(*x.shape[:-1], channels)
