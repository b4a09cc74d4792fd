"""Attention within documents: eight documents of 1024 tokens, one of 8192, head widths of common decoders."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from kernels.document_attention import DocumentBounds, document_attention, document_bounds
from kernels.workloads import Cost, Sizes, Workload


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    length = sizes["documents"] * sizes["length"]

    def normal(heads: int) -> Tensor:  # tokens before heads, as projections give them
        x = torch.randn(1, length, heads, sizes["width"], device=device, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    documents = torch.arange(length, device=device)[None] // sizes["length"]
    query_heads, key_heads = sizes["heads"], sizes["key_heads"]
    q, k, v = normal(query_heads), normal(key_heads), normal(key_heads)
    return {"q": q, "k": k, "v": v, "documents": document_bounds(documents)}


def _plain(q: Tensor, k: Tensor, v: Tensor, documents: DocumentBounds) -> Tensor:
    order = torch.arange(q.shape[2], device=q.device)
    allowed = (order <= order[:, None]) & (order >= documents.first[:, :, None])
    return scaled_dot_product_attention(q, k, v, allowed[:, None], enable_gqa=q.shape[1] != k.shape[1])


def _one_document(q: Tensor, k: Tensor, v: Tensor, documents: DocumentBounds) -> Tensor:
    """What the library does where one document fills the row: FlashAttention-2 or cuDNN, the faster one on the GPU."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


_flex = torch.compile(flex_attention)
_masks: dict[tuple[int, int], BlockMask] = {}


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, documents: DocumentBounds) -> Tensor:
    first, length = documents.first, q.shape[2]

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[batch, query])

    mark = first.data_ptr(), length
    if mark not in _masks:  # made once for all layers of a model, and so not timed
        _masks.clear()
        _masks[mark] = create_block_mask(allowed, q.shape[0], None, length, length, device=str(q.device))
    return _flex(q, k, v, block_mask=_masks[mark], enable_gqa=q.shape[1] != k.shape[1])


def _workload(documents: int, width: int, dtype: torch.dtype, key_heads: int = 8) -> Workload:
    def forward(sizes: Sizes) -> Cost:
        rows = sizes["documents"] * sizes["length"]
        heads, key_heads = sizes["heads"], sizes["key_heads"]
        # two products over the pairs under the diagonal; q and y, k and v, the float32 log of sums
        flops = 2 * sizes["documents"] * sizes["length"] ** 2 * heads * sizes["width"]
        return Cost(rows * (2 * (heads + key_heads) * sizes["width"] * dtype.itemsize + 4 * heads), flops)

    def backward(sizes: Sizes) -> Cost:
        rows = sizes["documents"] * sizes["length"]
        # five products; q, y, dy, dq and k, v, dk, dv
        read_and_written = 4 * (sizes["heads"] + sizes["key_heads"]) * sizes["width"] * dtype.itemsize
        return Cost(rows * (read_and_written + 4 * sizes["heads"]), 5 * forward(sizes).flops // 2)

    rivals = {"flex_attention": _flex_attention}
    if documents == 1:
        rivals["scaled_dot_product_attention"] = _one_document
    heads = {"heads": 32 if width == 128 else 4 * key_heads, "key_heads": key_heads, "width": width}
    return Workload(
        op="document_attention",
        dtype=dtype,
        sizes={"documents": documents, "length": 8192 // documents, **heads},
        small={"documents": documents, "length": 64 // documents, **heads},
        inputs=_inputs,
        kernel=partial(document_attention, kernels="triton"),
        plain=_plain,
        forward=forward,
        backward=backward,
        rivals=rivals,
    )


WORKLOADS = [
    _workload(8, 128, torch.bfloat16),
    _workload(1, 128, torch.bfloat16),
    _workload(8, 64, torch.bfloat16),
    _workload(8, 80, torch.bfloat16),
    _workload(8, 128, torch.float32),
]
