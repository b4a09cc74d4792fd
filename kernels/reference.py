"""What each operation computes, in plain torch: the truth for tests, the CPU path, the form that is exported."""

import torch
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
