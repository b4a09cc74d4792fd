# torch.autograd has few types:
# mypy: disable-error-code="no-untyped-call, untyped-decorator, no-any-return"
"""RMS and layer norm, also of a sum with the residual stream: what models call (kernels: `kernels.norm_triton`)."""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.registration import register


def _fwd_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, rstd.new_empty(x.shape[0] if centered else 0), rstd


def _bwd_fake(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape if biased else 0)


_MODULE = "kernels.norm_triton"
_fwd = register(
    "norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centered)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _MODULE,
    _fwd_fake,
)
_bwd = register(
    "norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool biased)"
    " -> (Tensor, Tensor, Tensor)",
    _MODULE,
    _bwd_fake,
)


class _Norm(torch.autograd.Function):
    """Outside of the operation, not registered with it: half the overhead per call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, total, mean, rstd = _fwd(x, residual, weight, bias, eps, centered)
        ctx.biased = bias is not None
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        return y if residual is None else (y, total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dy: Tensor, dtotal: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, None, None]:
        dx, dweight, dbias = _bwd(dy, dtotal, *ctx.saved_tensors, ctx.biased)
        return dx, None if dtotal is None else dx, dweight, dbias if ctx.biased else None, None, None


def _normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    _check(x, weight, bias)
    return _Norm.apply(x.reshape(-1, x.shape[-1]), None, weight, bias, eps, centered).view(x.shape)


def _sum_normalized(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {residual.dtype} {list(residual.shape)}; x, which is added to it, {x.dtype} {list(x.shape)}"
        )
    rows, residual = x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1])
    y, total = _Norm.apply(rows, residual, weight, bias, eps, centered)
    return y.view(x.shape), total.view(x.shape)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {list(given.shape)}; x of shape {list(x.shape)} needs [{x.shape[-1]}]")


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
    return _normalized(x, weight, None, eps, False)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The sum of `x` and `residual`, normalized as by `rms_norm`, and the sum itself: the new residual stream.

    Args:
        x: What is added to the residual stream [..., D].
        residual: The residual stream, of the same shape and dtype.
        weight: Scale of each column [D].
        eps: Added to the mean square before its root.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Normalized sums, and the sums rounded to the dtype of `x`, of which they are computed; both [..., D].

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: `residual` or `weight` does not fit `x`.
    """
    if not runs_kernel(kernels, x):
        return reference.add_rms_norm(x, residual, weight, eps)
    return _sum_normalized(x, residual, weight, None, eps, False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kernels: str = "auto") -> Tensor:
    """Rows of `x` shifted to a mean of zero, scaled to a variance of one, then by `weight`, plus `bias`.

    Layer normalization (arXiv:1607.06450).

    Args:
        x: Activations [..., D].
        weight: Scale of each column [D].
        bias: Added to each column [D]; None = nothing.
        eps: Added to the variance before its root.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Normalized activations [..., D] in the dtype of `x`; statistics are computed in float32.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: `weight` or `bias` does not fit `x`.
    """
    if not runs_kernel(kernels, x):
        return reference.layer_norm(x, weight, bias, eps)
    return _normalized(x, weight, bias, eps, True)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The sum of `x` and `residual`, normalized as by `layer_norm`, and the sum itself: the new residual stream.

    Args:
        x: What is added to the residual stream [..., D].
        residual: The residual stream, of the same shape and dtype.
        weight: Scale of each column [D].
        bias: Added to each column [D]; None = nothing.
        eps: Added to the variance before its root.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Normalized sums, and the sums rounded to the dtype of `x`, of which they are computed; both [..., D].

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: `residual`, `weight` or `bias` does not fit `x`.
    """
    if not runs_kernel(kernels, x):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _sum_normalized(x, residual, weight, bias, eps, True)
