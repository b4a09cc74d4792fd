"""Norms, gated activations and rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum; both [..., D]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Rows of `x` [..., D] with mean zero and variance one, times `weight` [D] plus `bias` [D] (arXiv:1607.06450).

    Computes in float32, or in float64 for float64 inputs, and rounds once, at the end.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    shift = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), shift, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of x + residual, and that sum; both [..., D]."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up [..., F] (arXiv:2002.05202), rounded in between, so that what is saved stays narrow."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """gelu(gate) * up [..., F] (arXiv:2002.05202), exact for `none`, by tanh for `tanh`; rounded in between."""
    return F.gelu(gate, approximate=approximate) * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair (x[i], x[i + K/2]) of q [B, H, L, K] and k [B, G, L, K] turned by an angle (arXiv:2104.09864).

    Args:
        q: Queries.
        k: Keys.
        cos: Cosines of the angles [B or 1, 1, L, K], those of the first half again in the second; rounded to the dtype
            of `q`, as is usual.
        sin: Their sines.
    """
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
