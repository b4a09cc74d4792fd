"""Linear layers that are stored in few bits and multiplied as they are stored; for inference only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.compression.int8 import int8_linear
from kernels.dispatch import runs_kernel
from kernels.int4_layout import LARGEST_INT4, SYMMETRIC_ZERO, pack
from kernels.quantize import MAX_GROUP, quantize_rows
from kernels.w4a16_linear import w4a16_linear
from kernels.w8a8_linear import w8a8_linear


class W8A8Linear(nn.Module):
    """A linear layer with weights in 8 bits, whose activations are quantized row by row as they come.

    In INT8 without a kernel it takes float32 or float64 activations: the integer part is exact either way, so that the
    difference of the two is the float noise of all that surrounds it.

    Args:
        weight: Codes, int8 or E4M3 [N, K].
        weight_scale: Code step of each output channel, float32 [N].
        bias: Added to the result, float32 [N].
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, kernels: str = "auto") -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Products of the rows of `x` [..., K] with every channel, [..., N]."""
        if self.weight.dtype == torch.int8 and not runs_kernel(self.kernels, x, x.shape[-1], MAX_GROUP):
            y: Tensor = int8_linear(x, self.weight, self.weight_scale)  # what export translates
            return y if self.bias is None else y + self.bias
        codes, scale = quantize_rows(x, self.weight.dtype, self.kernels)
        return w8a8_linear(codes, self.weight, scale, self.weight_scale, self.bias, x.dtype, self.kernels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W8A8Linear:
        """Casts scales and bias, never codes: E4M3 counts as a floating-point dtype too."""
        weight = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight = fn(weight.view(torch.int8)).view(weight.dtype)
        return self


class W4A16Linear(nn.Module):
    """A linear layer with weights in 4 bits, with a scale for each group of columns, and 16-bit activations.

    Args:
        packed: Codes in the layout of `kernels.int4_layout`, int16 [N, ceil(K / 128) * 32].
        scales: Scale of each group of columns and channel [K / G, N], in the dtype of the activations.
        zeros: Code that stands for zero, uint8 [K / G, N]; None = 8 everywhere.
        bias: Added to the result [N].
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        bias: Tensor | None = None,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("bias", bias)
        self.kernels = kernels

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, group_size: int, symmetric: bool, kernels: str = "auto"
    ) -> W4A16Linear:
        """The layer with the codes that are nearest to a weight [N, K]; see `quantize_int4`."""
        codes, scales, zeros = quantize_int4(weight, group_size, symmetric)
        return cls(
            pack(codes), scales.t().contiguous(), None if zeros is None else zeros.t().contiguous(), bias, kernels
        )

    def forward(self, x: Tensor) -> Tensor:
        """Products of the rows of `x` [..., K] with every channel, [..., N]."""
        return w4a16_linear(x, self.packed, self.scales, self.zeros, self.bias, self.kernels)


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Nearest 4-bit codes (ties to even) of a weight, in groups of columns; zero stays zero.

    Args:
        weight: [N, K]; `group_size` divides K.
        group_size: Columns that share a scale.
        symmetric: Codes 1 to 15 around 8, else 0 to 15 around a zero point of each group.

    Returns:
        Codes, uint8 [N, K], scales [N, K / G] in the dtype of the weight, and zero points, uint8 [N, K / G], or None.
    """
    groups = torch.unflatten(weight.detach(), 1, (-1, group_size))
    wide = groups.to(torch.promote_types(weight.dtype, torch.float32))
    if symmetric:
        scales, zeros = wide.abs().amax(-1) / (LARGEST_INT4 - SYMMETRIC_ZERO), None
    else:
        low, high = wide.amin(-1).clamp_max(0), wide.amax(-1).clamp_min(0)
        scales = (high - low) / LARGEST_INT4
    scales = scales.to(weight.dtype).clamp_min(torch.finfo(weight.dtype).tiny)  # as stored: codes fit what is read
    steps = wide / scales.to(wide.dtype)[..., None]
    if symmetric:
        codes = steps.round() + SYMMETRIC_ZERO
    else:
        zeros = (-low / scales.to(wide.dtype)).round().clamp(0, LARGEST_INT4)
        codes = steps.round() + zeros[..., None]
        zeros = zeros.to(torch.uint8)
    return codes.clamp(0, LARGEST_INT4).to(torch.uint8).flatten(1), scales, zeros
