"""Attention of one new token per sequence; its kernels are in `kernels.paged_decode_attention_triton`."""

from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.registration import register

MAX_HEAD_WIDTH = 256
"""Widest head of which a program holds a block of keys and one of values."""


def _fwd_fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    return q.new_empty(q.shape)


_fwd = register(
    "paged_decode_attention_fwd(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths) -> Tensor",
    "kernels.paged_decode_attention_triton",
    _fwd_fake,
)


def paged_decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, kernels: str = "auto"
) -> Tensor:
    """Means of each sequence's cached values, weighted by softmax(q k / sqrt(K)), for one query per sequence and head.

    Keys and values lie in pages, in any order, so that sequences of different lengths waste no memory
    (PagedAttention, arXiv:2309.06180). A sequence's result depends on no other sequence, bit for bit. It has no
    gradient.

    Args:
        q: Queries of the newest token [S, H, K].
        k_pages: Cached keys [P, page size, G, K]; H / G query heads share a head of keys and values.
        v_pages: Cached values, in the same places.
        page_table: Numbers of each sequence's pages, in the order of its tokens, int32 or int64 [S, M]; those behind
            its last page are not read. The kernel starts work for M pages a sequence: cut off columns nobody needs.
        lengths: Tokens of each sequence in the cache, its newest included, int32 or int64 [S]; at most M pages. Zero
            gives zeros.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        [S, H, K] in the dtype of `q`; sums are computed in float32.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: The shapes do not fit.
    """
    sequences, heads, width = q.shape
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(f"q is {q.dtype}, k_pages {k_pages.dtype}, v_pages {v_pages.dtype}; they have to be the same")
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != width or heads % k_pages.shape[2]:
        raise ValueError(
            f"k_pages has shape {list(k_pages.shape)} and v_pages {list(v_pages.shape)}; q of shape {list(q.shape)} "
            f"needs [pages, page size, a divisor of {heads}, {width}] for both"
        )
    if len(page_table) != sequences or lengths.shape != (sequences,):
        raise ValueError(
            f"page_table has shape {list(page_table.shape)} and lengths {list(lengths.shape)}; "
            f"q of shape {list(q.shape)} needs [{sequences}, pages] and [{sequences}]"
        )
    if not runs_kernel(kernels, q, width, MAX_HEAD_WIDTH):
        return reference.paged_decode_attention(q, k_pages, v_pages, page_table, lengths)
    return _fwd(q, k_pages, v_pages, page_table, lengths)  # type: ignore[no-any-return]
