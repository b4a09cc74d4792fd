# torch.library is untyped:
# mypy: disable-error-code="no-untyped-call,untyped-decorator"
"""Symmetric INT8: weights per output channel, activations per row, exact INT32 sums.

A row's scale comes from that row alone, so that no result depends on what shares its batch. One operation,
`millrace::int8_linear`, is what modules call and what `flows.export.program` translates to integer operations of ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

LEVELS = 127
"""Largest code; -128 stays unused, so that codes are symmetric."""
SMALLEST_AMAX = 1e-30
"""Rows that are closer to zero than this count as zero: their scale must not be zero."""
MAX_COLUMNS = (2**31 - 1) // LEVELS**2
"""Longest row whose sum of products is sure to fit INT32."""


def choose_scale(x: Tensor) -> Tensor:
    """Size of one code step for each row of `x` [..., K], so that its largest magnitude is code 127; [..., 1]."""
    return x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) / LEVELS


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Nearest codes (ties to even) of `x` in steps of `scale`, int8 in [-127, 127]; zero is code 0."""
    return (x / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """What `codes` stand for, in the dtype of `scale`; within scale / 2 of what was quantized."""
    return codes.to(scale.dtype) * scale


def sqnr_db(x: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(sum x^2 / sum (x - approximation)^2)."""
    signal, noise = x.double().square().sum(), (x.double() - approximation.double()).square().sum()
    return float(10 * torch.log10(signal / noise)) if signal > 0 else float("inf")


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """`a` [M, K] times the transpose of `b` [N, K], both int8, as exact int32 sums [M, N].

    On CUDA the integer kernel takes more than 16 rows and multiples of 8 only; float64, whose sums of such products are
    exact up to 2^53, does the rest.
    """
    (rows, columns), channels = a.shape, b.shape[0]
    if a.is_cuda and (rows <= 16 or columns % 8 or channels % 8):
        return (a.double() @ b.double().t()).to(torch.int32)
    return torch._int_mm(a, b.t())


_library = torch.library.Library("millrace", "FRAGMENT")
_library.define("int8_linear(Tensor x, Tensor weight, Tensor weight_scale) -> Tensor")


def _int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    scale = choose_scale(x)
    codes = quantize(x, scale)
    sums = exact_product(codes.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0])
    return sums.to(x.dtype) * weight_scale.to(x.dtype) * scale


_library.impl("int8_linear", _int8_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("millrace::int8_linear", lib=_library)
def _(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class Int8Linear(nn.Module):
    """A linear layer that is stored and multiplied in INT8; for inference only.

    Takes float32 or float64 activations: the integer part is exact either way, so that the difference of the two is the
    float noise of all that surrounds it.

    Args:
        weight: Codes, int8 [N, K].
        weight_scale: Code step of each output channel, float32 [N].
        bias: Added to the result, float32 [N].
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Products of the rows of `x` [..., K] with every channel, [..., N]."""
        y: Tensor = torch.ops.millrace.int8_linear(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias


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
        return dequantize(embedding(ids, self.weight), embedding(ids, self.weight_scale[:, None]))
