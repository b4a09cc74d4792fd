# torch.autograd has few types:
# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""RMS norm as a registered operation: what models call; kernels and launches are in `kernels.rms_norm_triton`."""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.registration import register


def _fwd_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


def _bwd_fake(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


_MODULE = "kernels.rms_norm_triton"
_fwd = register("rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _MODULE, _fwd_fake)
_bwd = register("rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)", _MODULE, _bwd_fake)


class _RMSNorm(torch.autograd.Function):
    """Outside of the operation, not registered with it: half the overhead per call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dweight = _bwd(dy, *ctx.saved_tensors)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: str = "auto") -> Tensor:
    """Rows of `x` scaled to a root mean square of one, then by `weight` (arXiv:1910.07467).

    Args:
        x: Activations [..., D].
        weight: Scale of each column [D].
        eps: Added to the mean square before its root.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Normalized activations [..., D] in the dtype of `x`; statistics are computed in float32.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: `weight` does not fit `x`.
    """
    if not runs_kernel(kernels, x):
        return reference.rms_norm(x, weight, eps)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}; x of shape {list(x.shape)} needs [{x.shape[-1]}]")
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)  # type: ignore[no-any-return]
