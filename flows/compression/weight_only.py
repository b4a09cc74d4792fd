# torch.library is untyped:
# mypy: disable-error-code="no-untyped-call,untyped-decorator"
"""Weights of few bits that meet activations in floating point, as operations that export translates.

`millrace::int8_weight_linear`, `millrace::int4_weight_linear` and `millrace::int4_embedding` are what layers call where
no kernel runs and what `flows.export.low_bit_operations` translates to ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from kernels import reference
from kernels.int4_layout import SYMMETRIC_ZERO, unpack
from kernels.reference import INT8

_library = torch.library.Library("millrace", "FRAGMENT")
_library.define("int8_weight_linear(Tensor x, Tensor weight, Tensor weight_scale) -> Tensor")
_library.define(
    "int4_weight_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, bool int8_activations) -> Tensor"
)
_library.define("int4_embedding(Tensor ids, Tensor packed, Tensor scales, Tensor? zeros, int columns) -> Tensor")


def _int8_weight_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ (weight.to(wide) * weight_scale.to(wide)[:, None]).t()).to(x.dtype)


def _int4_weight_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, int8_activations: bool
) -> Tensor:
    if int8_activations:
        x = round_groups(x, x.shape[-1] // scales.shape[0])
    return reference.w4a16_linear(x, packed, scales, zeros, None)


def round_groups(x: Tensor, group_size: int) -> Tensor:
    """Activations [..., K] as INT8 codes with a scale for each group of columns stand for them, in their dtype."""
    return reference.dequantize(*reference.quantize_groups(x, group_size, INT8), x.dtype)


def _int4_embedding(ids: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, columns: int) -> Tensor:
    group_size = columns // scales.shape[0]
    rows = unpack(embedding(ids.flatten(), packed), columns)
    codes = torch.unflatten(rows, 1, (-1, group_size)).to(scales.dtype)
    centre = SYMMETRIC_ZERO if zeros is None else embedding(ids.flatten(), zeros.t()).to(scales.dtype)[..., None]
    found = (codes - centre) * embedding(ids.flatten(), scales.t())[..., None]
    return found.view(*ids.shape, columns)


for _name, _compute in {
    "int8_weight_linear": _int8_weight_linear,
    "int4_weight_linear": _int4_weight_linear,
    "int4_embedding": _int4_embedding,
}.items():
    _library.impl(_name, _compute, "CompositeExplicitAutograd")


@torch.library.register_fake("millrace::int8_weight_linear", lib=_library)
def _(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("millrace::int4_weight_linear", lib=_library)
def _(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, int8_activations: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.register_fake("millrace::int4_embedding", lib=_library)
def _(ids: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, columns: int) -> Tensor:
    return scales.new_empty((*ids.shape, columns))


int8_weight_linear = torch.ops.millrace.int8_weight_linear
"""Activations [..., K], int8 codes [N, K] and their scales [N] to results [..., N] in the activations' dtype."""
int4_weight_linear = torch.ops.millrace.int4_weight_linear
"""Activations [..., K] and 4-bit weights as in `kernels.w4a16_linear` to results [..., N]; the activations may be
rounded to INT8 first, group by group."""
int4_embedding = torch.ops.millrace.int4_embedding
"""Ids [...] and 4-bit rows of a number of columns D to rows [..., D] in the dtype of the scales."""


class Int4Embedding(nn.Module):
    """An embedding whose rows are stored in 4 bits, with a scale for each group of columns.

    It holds what `W4A16Linear` holds, so that an output projection can share it.

    Args:
        packed: Codes in the layout of `kernels.int4_layout`, int16 [V, ceil(D / 128) * 32].
        scales: Scale of each group of columns and row [D / G, V].
        zeros: Code that stands for zero, uint8 [D / G, V]; None = 8 everywhere.
        columns: D; the last block of `packed` may be cut short.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, packed: Tensor, scales: Tensor, zeros: Tensor | None, columns: int) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.columns = columns

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the matrix for `ids` [...], in the dtype of the scales, [..., D]."""
        rows: Tensor = int4_embedding(ids, self.packed, self.scales, self.zeros, self.columns)
        return rows
