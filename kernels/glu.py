# torch.autograd has few types:
# mypy: disable-error-code="no-untyped-call, untyped-decorator, no-any-return"
"""Gated linear units as registered operations: what models call; kernels and launches are in `kernels.glu_triton`."""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.registration import register


def _fwd_fake(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _bwd_fake(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_MODULE = "kernels.glu_triton"
_fwd = register("glu_fwd(Tensor gate, Tensor up, str kind) -> Tensor", _MODULE, _fwd_fake)
_bwd = register("glu_bwd(Tensor dy, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor)", _MODULE, _bwd_fake)


class _GLU(torch.autograd.Function):
    """Keeps its inputs only: the way back computes the activation again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _fwd(gate, up, kind)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_bwd(dy, *ctx.saved_tensors, ctx.kind), None


def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    if up.shape != gate.shape:
        raise ValueError(f"up has shape {list(up.shape)}; gate, which it is multiplied with, {list(gate.shape)}")
    width = gate.shape[-1]
    return _GLU.apply(gate.reshape(-1, width), up.reshape(-1, width), kind).view(gate.shape)


def swiglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """silu(gate) * up, the middle of a SwiGLU feed-forward layer (arXiv:2002.05202).

    Args:
        gate: What the activation is taken of [..., F].
        up: What is gated [..., F].
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Gated activations [..., F] in the dtype of `gate`. The kernel computes them in float32 and rounds once.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: `up` does not fit `gate`.
    """
    if not runs_kernel(kernels, gate, columns=1):
        return reference.swiglu(gate, up)
    return _gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh", kernels: str = "auto") -> Tensor:
    """gelu(gate) * up, the middle of a GeGLU feed-forward layer (arXiv:2002.05202).

    Args:
        gate: What the activation is taken of [..., F].
        up: What is gated [..., F].
        approximate: `tanh` as Gemma does it, or `none` for the exact GELU; torch's words.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Gated activations [..., F] in the dtype of `gate`. The kernel computes them in float32 and rounds once.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: `up` does not fit `gate`, or `approximate` is neither.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f'approximate={approximate!r} is not a GELU. Use "tanh" or "none".')
    if not runs_kernel(kernels, gate, columns=1):
        return reference.geglu(gate, up, approximate)
    return _gated(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")
