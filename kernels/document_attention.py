# torch.autograd has few types:
# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""Causal attention within documents: what models call; its kernels are in `kernels.document_attention_triton`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.registration import register

MAX_HEAD_WIDTH = 128
"""Widest head whose accumulators a program of the backward pass holds in registers."""


class DocumentBounds(NamedTuple):
    """Where the document of each token lies in its row."""

    first: Tensor
    """Position of its first token, int32 [B, L]."""
    end: Tensor
    """Position behind its last token, int32 [B, L]."""


def document_bounds(document_ids: Tensor) -> DocumentBounds:
    """Bounds of each token's document, computed where the ids are, without waiting for them.

    Args:
        document_ids: Number of the document that each token belongs to, never falling along a row [B, L].
    """
    length = document_ids.shape[1]
    order = torch.arange(length, device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    ends = begins.roll(-1, 1)  # each begins behind the end of the one before, the first where the row ends
    first = order.where(begins, 0).cummax(1).values
    end = (order + 1).where(ends, length).flip(1).cummin(1).values.flip(1)
    return DocumentBounds(first.int(), end.int())


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    return empty_beside(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _bwd_fake(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, first: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_beside(q), empty_beside(k), empty_beside(v)


def empty_beside(x: Tensor) -> Tensor:
    """Uninitialized [B, H, L, K] like `x` with tokens before heads in memory, as the next projection takes them."""
    batch, heads, length, width = x.shape
    return x.new_empty((batch, length, heads, width)).transpose(1, 2)


_MODULE = "kernels.document_attention_triton"
_fwd = register(
    "document_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor first) -> (Tensor, Tensor)", _MODULE, _fwd_fake
)
_bwd = register(
    "document_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor first, Tensor end)"
    " -> (Tensor, Tensor, Tensor)",
    _MODULE,
    _bwd_fake,
)


class _DocumentAttention(torch.autograd.Function):
    """Outside of the operation, not registered with it: half the overhead per call."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor) -> Tensor:
        y, lse = _fwd(q, k, v, first)
        ctx.save_for_backward(q, k, v, y, lse, first, end)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        return *_bwd(dy, *ctx.saved_tensors), None, None


def attends_by_kernel(kernels: str, x: Tensor, head_width: int) -> bool:
    """Whether `document_attention` runs its kernel; arguments as in `kernels.dispatch.runs_kernel`.

    Args:
        kernels: `auto`, `triton` or `reference`.
        x: Of the dtype and on the device of queries, keys and values.
        head_width: Columns K of a head.

    Raises:
        KernelError: `triton` is asked for and impossible.
    """
    return runs_kernel(kernels, x, head_width, MAX_HEAD_WIDTH)


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: DocumentBounds | None, kernels: str = "auto"
) -> Tensor:
    """Means of the values of each token's document up to itself, weighted by softmax(q k / sqrt(K)).

    Blocks of keys that belong to other documents are neither read nor multiplied, and no mask [L, L] exists
    (FlashAttention-2, arXiv:2307.08691). What a token gets depends on no other document.

    Args:
        q: Queries [B, H, L, K].
        k: Keys [B, G, L, K]; H / G query heads share a head of keys and values (arXiv:2305.13245).
        v: Values [B, G, L, K].
        documents: Bounds of each token's document; None = one document fills each row, which is the library's
            `scaled_dot_product_attention` whatever `kernels` says.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        [B, H, L, K] in the dtype of `q`; sums are computed in float32.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: The shapes do not fit.
    """
    if documents is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    if not attends_by_kernel(kernels, q, q.shape[-1]):
        return reference.document_attention(q, k, v, documents.first)
    batch, heads, length, width = q.shape
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, length, width) or heads % k.shape[1]:
        raise ValueError(
            f"k has shape {list(k.shape)} and v {list(v.shape)}; q of shape {list(q.shape)} needs "
            f"[{batch}, a divisor of {heads}, {length}, {width}] for both"
        )
    if documents.first.shape != (batch, length):
        raise ValueError(f"documents have shape {list(documents.first.shape)}; q needs [{batch}, {length}]")
    return _DocumentAttention.apply(q, k, v, *documents)  # type: ignore[no-any-return]
