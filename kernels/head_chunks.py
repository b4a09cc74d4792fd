# torch.autograd has few types:
# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""Scores of some tokens at a time: the loop and the gradient that losses fused with the output projection share.

A chunk's scores are computed, compared and overwritten by their gradient, which is multiplied with the projection and
with the hidden states at once: the scores of all tokens never exist together, and the backward pass only scales what is
there already. Three matrix products for what is trained, one for a teacher; recomputing would take a fourth.

The projection's gradient is added up in float32, in place, by the matrix product itself. That costs reading and writing
it once per chunk, which is why a chunk on a GPU is as large as a share of that very gradient allows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.chunk_sizes import CPU_TOKENS, gpu_tokens

Rows = Callable[[Tensor, slice], tuple[Tensor, Tensor | None]]
"""From scores [C, V], which it may overwrite, and the tokens they are of: losses [C], gradient of the scores [C, V]."""
_ALIGNED = 64
"""Elements to a multiple of which rows of scores are padded, so that an odd vocabulary does not slow down the rest."""


def chunk_tokens(num_tokens: int, x: Tensor, share: float) -> int:
    """How many tokens to project at once.

    Args:
        num_tokens: Tokens in all.
        x: Hidden states [N, D].
        share: Memory that their scores may take on a GPU; see `kernels.chunk_sizes`.
    """
    if x.device.type != "cuda":
        return max(1, min(CPU_TOKENS, num_tokens))
    return gpu_tokens(num_tokens, x.shape[1], x.element_size(), share)


def scores_buffer(tokens: int, vocab_size: int, like: Tensor) -> Tensor:
    """Room for scores [tokens, vocab_size] whose rows start at aligned addresses."""
    padded = -(-vocab_size // _ALIGNED) * _ALIGNED
    return like.new_empty(tokens, padded)[:, :vocab_size]


def sum_over_chunks(
    x: Tensor, weight: Tensor, vocab_size: int, chunk: int, rows: Rows, wants_dx: bool, wants_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of all losses [] and its gradients; those that are not wanted are empty.

    Args:
        x: Hidden states [N, D].
        weight: Output projection [W, D] in the same dtype.
        vocab_size: Leading rows of `weight` that count; the others are neither read nor given a gradient but zero.
        chunk: Tokens at a time.
        rows: The loss.
        wants_dx: Whether to compute the gradient of `x` [N, D], in its dtype.
        wants_dweight: Whether to compute the gradient of `weight` [W, D], in float32 if that is wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(len(x), dtype=wide)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_dx else x.new_empty(0)
    dweight = x.new_empty(weight.shape if wants_dweight else 0, dtype=wide)
    if wants_dweight:
        dweight[vocab_size if len(x) else 0 :].zero_()
    projection = weight[:vocab_size]
    buffer = scores_buffer(min(chunk, len(x)), vocab_size, x)
    for first in range(0, len(x), chunk):
        tokens = slice(first, min(first + chunk, len(x)))
        scores = torch.mm(x[tokens], projection.t(), out=buffer[: tokens.stop - first])
        losses[tokens], gradient = rows(scores, tokens)
        if gradient is None:
            continue
        if wants_dx:
            torch.mm(gradient, projection, out=dx[tokens])
        if wants_dweight:
            _add_product(dweight[:vocab_size], gradient.t(), x[tokens], first=first == 0)
    return losses.sum(), dx, dweight


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b in the precision of `total`; the first product is written over what is there."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    elif first:  # a CPU has no product of narrow matrices that is not rounded
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def empty_sums(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of an operation whose last arguments are wants_dx, wants_dweight and kernel."""
    *_, wants_dx, wants_dweight, _ = rest
    wide = torch.promote_types(x.dtype, torch.float32)
    dx, dweight = x.shape if wants_dx else (0,), weight.shape if wants_dweight else (0,)
    return x.new_empty((), dtype=wide), x.new_empty(dx), x.new_empty(dweight, dtype=wide)


def differentiable(operation: Callable[..., Any], x: Tensor, weight: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """The sum of the losses [] that an operation computes together with its gradients, where torch records them.

    Args:
        operation: Called as (x, weight, *arguments, wants_dx, wants_dweight, kernel).
        x: Hidden states [N, D].
        weight: Output projection [W, D].
        arguments: The others, `kernel` last.
    """
    recorded = torch.is_grad_enabled()
    wanted = (recorded and x.requires_grad, recorded and weight.requires_grad)
    return _SumOfLosses.apply(x, weight, operation, wanted, *arguments)  # type: ignore[no-any-return]


class _SumOfLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operation: Any, wanted: tuple[bool, bool], *rest: Any) -> Tensor:
        *arguments, kernel = rest
        loss, dx, dweight = operation(x, weight, *arguments, *wanted, kernel)
        ctx.save_for_backward(dx, dweight)
        ctx.wanted, ctx.dtype, ctx.num_rest = wanted, weight.dtype, len(rest)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        wants_dx, wants_dweight = ctx.wanted
        return (
            dx * scale.to(dx.dtype) if wants_dx else None,
            scaled(dweight, scale, ctx.dtype) if wants_dweight else None,
            *[None] * (2 + ctx.num_rest),
        )


def scaled(dweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient times `scale` [], written over itself, in `dtype`.

    A narrower dtype takes the first half of the memory: the gradient and its rounded copy are together what a large
    vocabulary has no room for.
    """
    dweight.mul_(scale)
    if dtype == dweight.dtype or not dweight.numel():
        return dweight
    rows, width = dweight.shape
    narrow = dweight.view(-1).view(dtype)[: rows * width].view(rows, width)
    narrow[:1] = dweight[:1].clone()
    done = 1
    while done < rows:  # the rounded rows end below those that are still to be read
        after = min(2 * done, rows)
        narrow[done:after] = dweight[done:after]
        done = after
    return narrow


def check_projection(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> None:
    """Raises ValueError where hidden states, projection, labels and vocabulary do not fit."""
    if weight.shape[1:] != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight is {list(weight.shape)} {weight.dtype}; x is {list(x.shape)} {x.dtype} and needs "
            f"[vocabulary, {x.shape[-1]}] {x.dtype}"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets have shape {list(targets.shape)}; x of shape {list(x.shape)} needs one each")
    if not 1 <= vocab_size <= len(weight):
        raise ValueError(f"vocab_size={vocab_size} must be between 1 and the {len(weight)} rows of weight")
