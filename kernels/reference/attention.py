"""Attention over documents and over pages."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def document_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
    """Means of the values of each token's document up to itself, weighted by softmax(q k / sqrt(K)).

    Args:
        q: Queries [B, H, L, K].
        k: Keys [B, G, L, K].
        v: Values [B, G, L, K].
        first: Position of the first token of each token's document [B, L].

    Returns:
        [B, H, L, K] in the dtype of `q`.
    """
    order = torch.arange(q.shape[2], device=q.device)
    allowed = (order <= order[:, None]) & (order >= first[:, :, None])  # [B, L, L]
    return scaled_dot_product_attention(q, k, v, allowed[:, None], enable_gqa=q.shape[1] != k.shape[1])


def paged_decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """Means of each sequence's cached values, weighted by softmax(q k / sqrt(K)), for one query per sequence and head.

    Args:
        q: Queries of the newest token [S, H, K].
        k_pages: Cached keys [P, page size, G, K].
        v_pages: Cached values [P, page size, G, K].
        page_table: Numbers of each sequence's pages [S, M].
        lengths: Tokens of each sequence in the cache [S].

    Returns:
        [S, H, K] in the dtype of `q`; zeros for an empty sequence.
    """
    page, key_heads = k_pages.shape[1:3]
    token = torch.arange(page_table.shape[1] * page, device=q.device)
    cached = token < lengths[:, None]  # [S, T]
    places = page_table[:, token // page].where(cached, 0).long(), (token % page).expand_as(cached)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (pages[places].to(wide).where(cached[..., None, None], 0) for pages in (k_pages, v_pages))  # [S, T, G, K]
    grouped = q.to(wide).reshape(len(q), key_heads, -1, q.shape[2])
    scores = torch.einsum("sgmk,stgk->sgmt", grouped, k) * q.shape[2] ** -0.5
    weights = scores.masked_fill(~cached[:, None, None], -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("sgmt,stgk->sgmk", weights, v).flatten(1, 2).to(q.dtype)
