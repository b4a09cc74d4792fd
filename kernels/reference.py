"""What each operation computes, in plain torch: the truth for tests, the CPU path, the form that is exported."""

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
