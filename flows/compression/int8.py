# torch.library is untyped:
# mypy: disable-error-code="no-untyped-call,untyped-decorator"
"""Symmetric INT8: weights per output channel, activations per row, exact INT32 sums.

A row's scale comes from that row alone, so that no result depends on what shares its batch. One operation,
`millrace::int8_linear`, is what linear layers call where no kernel runs and what `flows.export.program` translates to
integer operations of ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from kernels import reference
from kernels.quantize import quantize_rows


def sqnr_db(x: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(sum x^2 / sum (x - approximation)^2)."""
    signal, noise = x.double().square().sum(), (x.double() - approximation.double()).square().sum()
    return float(10 * torch.log10(signal / noise)) if signal > 0 else float("inf")


_library = torch.library.Library("millrace", "FRAGMENT")
_library.define("int8_linear(Tensor x, Tensor weight, Tensor weight_scale) -> Tensor")


def _int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    codes, scale = quantize_rows(x, torch.int8, "reference")
    return reference.w8a8_linear(codes, weight, scale, weight_scale, None, x.dtype)


_library.impl("int8_linear", _int8_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("millrace::int8_linear", lib=_library)
def _(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


int8_linear = torch.ops.millrace.int8_linear
"""Activations [..., K], codes [N, K] and their scales [N] to results [..., N] in the dtype of the activations."""


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
