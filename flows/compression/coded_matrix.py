"""A matrix as codes: between the algorithms that choose them, the layers that multiply them and the file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flows.compression.int8 import Int8Embedding
from flows.compression.quantized_linear import W4A8Linear, W4A16Linear, W8A8Linear, W8A16Linear
from flows.compression.weight_only import Int4Embedding
from flows.config.model import Kernels
from flows.config.quantize import QuantizeConfig, Scheme
from flows.model.affine import INT4_SCALE_DTYPE, Grid, fit_grid
from kernels.int4_layout import SYMMETRIC_ZERO, pack
from kernels.quantize import dequantize, quantize_rows
from kernels.reference import FP8, INT8, LARGEST_CODE, SMALLEST_MAGNITUDE

INT4_SCHEMES = (Scheme.w4a16, Scheme.w4a8)


@dataclass(frozen=True)
class Coded:
    """Codes of a matrix [N, K], and what they stand for: (code - zero) * scale."""

    scheme: Scheme
    codes: Tensor
    """int8 [N, K], signed, or E4M3."""
    scales: Tensor
    """Of each row and group of columns [N, G]."""
    zeros: Tensor | None = None
    """Code that stands for zero, int8 [N, G]; None = 0."""
    input_scale: Tensor | None = None
    """Of all inputs, float32 []; None = none, or each row's own."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.scheme in INT4_SCHEMES else 8

    def restored(self) -> Tensor:
        """The matrix that the codes stand for, float32 [N, K]."""
        if self.codes.dtype == FP8:
            return dequantize(self.codes, self.scales, kernels="reference")
        return Grid(self.bits, self.scales, None if self.zeros is None else self.zeros.float()).restore(self.codes)


def fitted_grid(weight: Tensor, scheme: Scheme, config: QuantizeConfig, gram: Tensor | None = None) -> Grid:
    """The grid on which a scheme rounds a matrix [N, K] in whole numbers; see `flows.model.affine.fit_grid`."""
    if scheme not in INT4_SCHEMES:
        return fit_grid(weight, 8)
    return fit_grid(weight, 4, config.group_size, config.symmetric, INT4_SCALE_DTYPE, config.search, gram)


def on_grid(scheme: Scheme, grid: Grid, codes: Tensor) -> Coded:
    """Codes [N, K] of a grid as a matrix of a scheme."""
    return Coded(scheme, codes, grid.scales, None if grid.zeros is None else grid.zeros.to(torch.int8))


def nearest(weight: Tensor, scheme: Scheme, config: QuantizeConfig, gram: Tensor | None = None) -> Coded:
    """The codes that are nearest to each number of a matrix [N, K], on the grid of `fitted_grid`."""
    if scheme == Scheme.fp8:
        return Coded(scheme, *quantize_rows(weight, FP8, "reference"))
    grid = fitted_grid(weight, scheme, config, gram)
    return on_grid(scheme, grid, grid.codes(weight))


def embedding_scheme(scheme: Scheme) -> Scheme:
    """How an embedding is stored where linear layers have a scheme; a tied head then multiplies the same codes.

    Rows that are looked up meet no inputs, and E4M3 keeps less of them than INT8 in as many bits.
    """
    return Scheme.w8a8 if scheme == Scheme.fp8 else scheme


def make_layer(layer: nn.Module, coded: Coded, kernels: Kernels = Kernels.auto) -> nn.Module:
    """The layer that takes the place of a linear layer or an embedding; equal codes are shared, not copied.

    Args:
        layer: What is replaced.
        coded: Its matrix.
        kernels: Which implementation a linear layer runs.
    """
    if coded.scheme in INT4_SCHEMES:
        packed = pack(coded.codes.to(torch.int32) + SYMMETRIC_ZERO)
        scales = coded.scales.float().t().contiguous()
        zeros = None if coded.zeros is None else (coded.zeros.t().to(torch.int32) + SYMMETRIC_ZERO).to(torch.uint8)
        zeros = None if zeros is None else zeros.contiguous()
        if isinstance(layer, nn.Embedding):
            return Int4Embedding(packed, scales, zeros, coded.codes.shape[1])
        assert isinstance(layer, nn.Linear)
        kind = W4A8Linear if coded.scheme == Scheme.w4a8 else W4A16Linear
        return kind(packed, scales, zeros, layer.bias, kernels.value)
    scales = coded.scales.squeeze(-1)
    if isinstance(layer, nn.Embedding):
        return Int8Embedding(coded.codes, scales)
    assert isinstance(layer, nn.Linear)
    if coded.scheme == Scheme.w8a16:
        return W8A16Linear(coded.codes, scales, layer.bias, kernels.value)
    return W8A8Linear(coded.codes, scales, layer.bias, kernels.value, coded.input_scale)


def with_input_scale(coded: Coded, largest_input: float) -> Coded:
    """The matrix with inputs up to a magnitude on the grid of INT8, from -127 to 127."""
    step = max(largest_input, SMALLEST_MAGNITUDE) / LARGEST_CODE[INT8]
    return replace(coded, input_scale=torch.tensor(step, device=coded.codes.device))


def share_codes(model: nn.Module, name: str, other: str) -> None:
    """Has the layer called `other` hold the very tensors of the one called `name`, where both have them."""
    first, second = model.get_submodule(name), model.get_submodule(other)
    for key, tensor in first.named_buffers():
        if key in dict(second.named_buffers()):
            setattr(second, key, tensor)
