# torch.library is untyped:
# mypy: disable-error-code="no-untyped-call,untyped-decorator"
"""Symmetric 8-bit codes: weights per output channel, activations per row or with a scale known before.

A row's scale comes from that row alone, so that no result depends on what shares its batch. The operations
`millrace::int8_linear` and `millrace::fp8_linear` are what linear layers call where no kernel runs and what
`flows.export.low_bit_operations` translates to ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from kernels import reference
from kernels.quantize import quantize_rows
from kernels.reference import FP8, INT8, LARGEST_CODE


def sqnr_db(x: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(sum x^2 / sum (x - approximation)^2)."""
    signal, noise = x.double().square().sum(), (x.double() - approximation.double()).square().sum()
    return float(10 * torch.log10(signal / noise)) if signal > 0 else float("inf")


def quantize_by(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest codes (ties to even) of activations whose scale was chosen before; what lies beyond is cut off.

    Args:
        x: Activations.
        scale: What one code step stands for [].
        dtype: torch.int8, then -128 is used too, or torch.float8_e4m3fn.
    """
    steps = x.to(torch.promote_types(x.dtype, torch.float32)) / scale
    if dtype == INT8:
        return steps.round().clamp(-128, 127).to(dtype)
    return steps.clamp(-LARGEST_CODE[FP8], LARGEST_CODE[FP8]).to(dtype)


def quantize_activations(
    x: Tensor, input_scale: Tensor | None, dtype: torch.dtype, kernels: str
) -> tuple[Tensor, Tensor]:
    """Codes of activations [..., K] and the scale of each row [..., 1].

    Args:
        x: Activations [..., K].
        input_scale: Scale of all rows []; None = each row's own.
        dtype: torch.int8 or torch.float8_e4m3fn.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.
    """
    if input_scale is None:
        return quantize_rows(x, dtype, kernels)
    return quantize_by(x, input_scale, dtype), input_scale.expand(*x.shape[:-1], 1)


_library = torch.library.Library("millrace", "FRAGMENT")


def _linear(codes_dtype: torch.dtype) -> None:
    name = "int8_linear" if codes_dtype == INT8 else "fp8_linear"

    def compute(
        x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None
    ) -> Tensor:
        codes, scale = quantize_activations(x, input_scale, codes_dtype, "reference")
        return reference.w8a8_linear(codes, weight, scale, weight_scale, bias, x.dtype)

    def empty(
        x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    _library.define(
        f"{name}(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_scale) -> Tensor"
    )
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"millrace::{name}", empty, lib=_library)


_linear(INT8)
_linear(FP8)
int8_linear = torch.ops.millrace.int8_linear
"""Activations [..., K], int8 codes [N, K], their scales [N], perhaps a bias [N], perhaps the activations' scale [], to
results [..., N] in the dtype of the activations."""
fp8_linear = torch.ops.millrace.fp8_linear
"""The same with E4M3 codes."""


class Int8Embedding(nn.Module):
    """An embedding whose rows are stored in INT8, each with its own code step.

    Args:
        weight: Codes, int8 [V, D].
        weight_scale: Code step of each row, float32 [V].
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the matrix for `ids` [...], in the dtype of the code steps, [..., D]."""
        return embedding(ids, self.weight).to(self.weight_scale.dtype) * embedding(ids, self.weight_scale[:, None])
