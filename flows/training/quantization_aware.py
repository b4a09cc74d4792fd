# Calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return,no-untyped-call"
"""Quantization-aware training: layers that compute with rounded weights and inputs, and learn through the rounding.

Nothing is faked beyond training: what is saved is in floating point, and is measured and served as such, until a
`quantize` step stores its codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from flows.config.quantization_aware import QuantizationAwareConfig
from flows.model.affine import INT4_SCALE_DTYPE, Grid, fit_grid
from flows.model.decoder import Decoder
from kernels.quantize import dequantize, quantize_groups


def round_while_training(model: Decoder, config: QuantizationAwareConfig) -> None:
    """Makes linear layers and the embedding compute with rounded weights, in training and in validation.

    The weights themselves keep their names and their bits; a matrix that two layers share is rounded alike in both.

    Args:
        model: The decoder.
        config: How to round; its scheme is not None.
    """
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, RoundedLinear(layer, config))
        elif isinstance(layer, nn.Embedding):
            model.set_submodule(name, RoundedEmbedding(layer, config))


def weight_grid(weight: Tensor, config: QuantizationAwareConfig) -> Grid:
    """The grid on which a matrix [N, K] will be stored."""
    if config.bits == 8:
        return fit_grid(weight, 8)
    return fit_grid(weight, 4, config.group_size, config.symmetric, INT4_SCALE_DTYPE, config.search)


class RoundedLinear(nn.Linear):
    """A linear layer that takes over another one's weights, under the same names, and rounds them when it runs."""

    def __init__(self, layer: nn.Linear, config: QuantizationAwareConfig) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias, self.config = layer.weight, layer.bias, config

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., out_features]."""
        if self.config.rounds_inputs:
            input = _rounded_inputs(input, self.config)
        return linear(input, _rounded(self.weight, self.config), self.bias)


class RoundedEmbedding(nn.Embedding):
    """An embedding that takes over another one's weights, under the same name, and rounds the rows that it looks up."""

    def __init__(self, layer: nn.Embedding, config: QuantizationAwareConfig) -> None:
        super().__init__(layer.num_embeddings, layer.embedding_dim, _weight=layer.weight.detach())
        self.weight, self.config = layer.weight, config

    def forward(self, input: Tensor) -> Tensor:
        """Rows [..., embedding_dim] of ids [...]; no group of columns goes beyond a row."""
        rows = embedding(input.flatten(), self.weight)
        return _rounded(rows, self.config).view(*input.shape, -1)


def _rounded(weight: Tensor, config: QuantizationAwareConfig) -> Tensor:
    grid = weight_grid(weight, config)
    return _StraightThrough.apply(weight, grid.restore(grid.codes(weight.detach())).to(weight.dtype))


def _rounded_inputs(x: Tensor, config: QuantizationAwareConfig) -> Tensor:
    """Inputs [..., K] as INT8 codes stand for them, by rows, or by the groups that 4-bit weights have."""
    group_size = config.group_size if config.bits == 4 else x.shape[-1]
    return _StraightThrough.apply(x, dequantize(*quantize_groups(x, group_size), x.dtype))


class _StraightThrough(torch.autograd.Function):
    """The rounded numbers forward, their gradient as that of the numbers themselves backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
