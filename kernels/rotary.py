# torch.autograd has few types:
# mypy: disable-error-code="no-untyped-call, untyped-decorator, no-any-return"
"""Rotary positions as a registered operation: what models call; kernels and launches are in `kernels.rotary_triton`."""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.registration import register


def _fwd_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


def _bwd_fake(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dq), torch.empty_like(dk)


_MODULE = "kernels.rotary_triton"
_fwd = register("rotary_fwd(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()", _MODULE, _fwd_fake)
_bwd = register("rotary_bwd(Tensor dq, Tensor dk, Tensor cos, Tensor sin) -> (Tensor, Tensor)", _MODULE, _bwd_fake)


class _Rotary(torch.autograd.Function):
    """Overwrites its inputs. `mark_dirty` would say so, but takes no two views; the version counters say it as well:
    whoever kept what was overwritten for a way back gets torch's error, not a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        _fwd(q, k, cos, sin)
        torch.autograd.graph.increment_version((q, k))
        return q, k

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_bwd(dq, dk, *ctx.saved_tensors), None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """Each pair (x[i], x[i + K/2]) of queries and keys turned by its position's angle (arXiv:2104.09864).

    The kernel works in place, whatever the strides: views of a projection [B, L, H * K] are turned where they lie.
    Use what is returned and never again what was given. Under torch.compile nothing given changes.

    Args:
        q: Queries [B, H, L, K], fresh.
        k: Keys [B, G, L, K], fresh.
        cos: Cosine of each position's angles [B or 1, 1, L, K], those of the first half again in the second (Hugging
            Face's order); best in float32.
        sin: Sine of the same angles.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Turned queries and keys, shaped as they were.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: Shapes do not fit each other, or `q` or `k` is a leaf of the graph, which must not be overwritten.
    """
    if not runs_kernel(kernels, q):
        return reference.rotary(q, k, cos, sin)
    batch, _, length, width = q.shape
    if k.shape != (batch, k.shape[1], length, width) or width % 2:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must be [B, H, L, K] and [B, G, L, K], K even")
    if cos.shape != sin.shape or cos.shape not in {(batch, 1, length, width), (1, 1, length, width)}:
        raise ValueError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} must be [{batch} or 1, 1, {length}, {width}]"
        )
    if any(x.is_leaf and x.requires_grad for x in (q, k)):
        raise ValueError("q and k are turned in place: neither may be a leaf that requires gradients")
    return _Rotary.apply(q, k, cos, sin)
