"""Linear layers that are stored in few bits and multiplied as they are stored; for inference only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flows.compression.int8 import fp8_linear, int8_linear, quantize_activations
from flows.compression.weight_only import int4_weight_linear, int8_weight_linear, round_groups
from flows.model.affine import fit_grid
from kernels.dispatch import runs_kernel
from kernels.int4_layout import SYMMETRIC_ZERO, pack
from kernels.quantize import MAX_GROUP, dequantize
from kernels.reference import FP8
from kernels.w4a16_linear import DTYPES, w4a16_linear
from kernels.w8a8_linear import w8a8_linear


class W8A8Linear(nn.Module):
    """A linear layer with weights in 8 bits, whose activations are quantized as they come.

    In INT8 without a kernel it takes float32 or float64 activations: the integer part is exact either way, so that the
    difference of the two is the float noise of all that surrounds it.

    Args:
        weight: Codes, int8 or E4M3 [N, K].
        weight_scale: Code step of each output channel, float32 [N].
        bias: Added to the result, float32 [N].
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.
        input_scale: Code step of all activations, float32 [], found on calibration data; None = each row's own.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        kernels: str = "auto",
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Products of the rows of `x` [..., K] with every channel, [..., N]."""
        dtype = self.weight.dtype
        if not runs_kernel(self.kernels, x, x.shape[-1], MAX_GROUP, fp8=dtype == FP8):
            multiply = fp8_linear if dtype == FP8 else int8_linear  # what export translates
            y: Tensor = multiply(x, self.weight, self.weight_scale, self.bias, self.input_scale)
            return y
        codes, scale = quantize_activations(x, self.input_scale, dtype, self.kernels)
        return w8a8_linear(codes, self.weight, scale, self.weight_scale, self.bias, x.dtype, self.kernels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W8A8Linear:
        """Casts scales and bias, never codes: E4M3 counts as a floating-point dtype too."""
        weight = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight = fn(weight.view(torch.int8)).view(weight.dtype)
        return self


class W8A16Linear(nn.Module):
    """A linear layer with weights in INT8 and activations in floating point.

    On CUDA a kernel writes the weights out in the dtype of the activations, and torch's own product follows.

    Args:
        weight: Codes, int8 [N, K].
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
        if runs_kernel(self.kernels, x, x.shape[-1], MAX_GROUP):
            weight = dequantize(self.weight, self.weight_scale[:, None], x.dtype, self.kernels)
            return linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        y: Tensor = int8_weight_linear(x, self.weight, self.weight_scale)  # what export translates
        return y if self.bias is None else y + self.bias


class W4A16Linear(nn.Module):
    """A linear layer with weights in 4 bits, with a scale for each group of columns, and 16-bit activations.

    Without a kernel the activations may have any floating-point dtype, that of the scales.

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
        """The layer with the codes that are nearest to a weight.

        Args:
            weight: [N, K]; its dtype is that of the scales.
            bias: [N].
            group_size: See `quantize_int4`.
            symmetric: See there.
            kernels: See the class.
        """
        codes, scales, zeros = quantize_int4(weight, group_size, symmetric)
        return cls(
            pack(codes), scales.t().contiguous(), None if zeros is None else zeros.t().contiguous(), bias, kernels
        )

    def forward(self, x: Tensor) -> Tensor:
        """Products of the rows of `x` [..., K] with every channel, [..., N]."""
        if runs_kernel(self.kernels, x, 1, dtypes=DTYPES):
            return w4a16_linear(x, self.packed, self.scales, self.zeros, self.bias, self.kernels)
        y: Tensor = int4_weight_linear(x, self.packed, self.scales, self.zeros, False)  # what export translates
        return y if self.bias is None else y + self.bias


class W4A8Linear(W4A16Linear):
    """A linear layer with weights in 4 bits whose activations are rounded to INT8, each group of columns on its own.

    On a CPU the products are then of integers, several times as fast as those of `W4A16Linear` for a few rows. Its
    arguments are those of `W4A16Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Products of the rows of `x` [..., K] with every channel, [..., N]."""
        if runs_kernel(self.kernels, x, 1, dtypes=DTYPES):
            rounded = round_groups(x, x.shape[-1] // self.scales.shape[0])
            return w4a16_linear(rounded, self.packed, self.scales, self.zeros, self.bias, self.kernels)
        y: Tensor = int4_weight_linear(x, self.packed, self.scales, self.zeros, True)  # what export translates
        return y if self.bias is None else y + self.bias


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Nearest 4-bit codes (ties to even) of a weight, in groups of columns; zero stays zero.

    Args:
        weight: [N, K]; `group_size` divides K.
        group_size: Columns that share a scale.
        symmetric: Codes 1 to 15 around 8, else 0 to 15 around a zero point of each group.

    Returns:
        Codes, uint8 [N, K], scales [N, K / G] in the dtype of the weight, and zero points, uint8 [N, K / G], or None.
    """
    grid = fit_grid(weight, 4, group_size, symmetric, weight.dtype)
    codes = grid.codes(weight).to(torch.int32) + SYMMETRIC_ZERO
    zeros = None if grid.zeros is None else (grid.zeros.to(torch.int32) + SYMMETRIC_ZERO).to(torch.uint8)
    return codes.to(torch.uint8), grid.scales, zeros
