"""What each operation computes, in plain torch: the truth for tests, the CPU path, the form that is exported."""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows of `x` scaled to a root mean square of one, then by `weight` (arXiv:1910.07467).

    Computes in float32, or in float64 for float64 inputs, and rounds once, at the end.

    Args:
        x: Activations [..., D].
        weight: Scale of each column [D].
        eps: Added to the mean square before its root.

    Returns:
        Normalized activations [..., D] in the dtype of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)


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


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, step: Tensor
) -> Tensor:
    """A token for each request, int64 [S]: the draw of `kernels.sample_tokens`, which has the rules and the arguments.

    The same integers in the same steps, so that a draw differs only where an exponential is rounded otherwise and the
    target lies within that rounding.
    """
    scores = logits.float()
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    best, token = scores.max(1, keepdim=True).values, scores.argmax(1)
    draws = (temperature > 0) & best[:, 0].isfinite()
    scale = torch.full_like(best[:, 0], math.log2(math.e)) / temperature.float()
    power = (scores - best) * scale[:, None]
    weights = torch.where((power > -41) & draws[:, None], power.exp2() * 2.0**40, 0).long()  # [S, V]
    last = torch.where(top_k > 0, top_k, scores.shape[1]).clamp(max=scores.shape[1]).long() - 1
    kth = scores.sort(1, descending=True).values.gather(1, last[:, None])
    weights = weights.where(scores >= kth, 0)
    needed = _share(weights.sum(1), (top_p.float().clamp(max=1) * 2.0**31).long().clamp(min=1))
    stream = _mixed(_mixed(seed.long()) + step.long())
    while draws.any():
        stream = _mixed(stream)
        below = weights.cumsum(1)
        target = _share(below[:, -1], stream >> 33 & 0x7FFFFFFF)
        drawn = (below <= target[:, None]).sum(1).clamp(max=scores.shape[1] - 1)
        token = drawn.where(draws, token)
        weights = weights.where(scores > scores.gather(1, token[:, None]), 0)
        draws = draws & (weights.sum(1) >= needed)
    return token


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) in int64, whose shifts would drag the sign along."""
    bits = bits - 0x61C8864680B583EB
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31 & (1 << 33) - 1)


def _share(mass: Tensor, numerator: Tensor) -> Tensor:
    """Rounded down, mass * numerator / 2^31, of a mass below 2^62."""
    return (mass >> 31) * numerator + ((mass & 0x7FFFFFFF) * numerator >> 31)
