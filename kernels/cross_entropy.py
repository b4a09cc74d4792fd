# torch.autograd has few types:
# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""Cross-entropy on given scores as registered operations; kernels and launches: `kernels.cross_entropy_triton`."""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.registration import register


def _fwd_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


def _bwd_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_MODULE = "kernels.cross_entropy_triton"
_KNOBS = "int vocab_size, float softcap, float z_loss, float label_smoothing"
_fwd = register(f"cross_entropy_fwd(Tensor logits, Tensor targets, {_KNOBS}) -> (Tensor, Tensor)", _MODULE, _fwd_fake)
_SAVED = "Tensor targets, Tensor lse, Tensor scale"
_bwd = register(f"cross_entropy_bwd(Tensor logits, {_SAVED}, {_KNOBS}) -> Tensor", _MODULE, _bwd_fake)
_bwd_ = register(f"cross_entropy_bwd_(Tensor(a!) logits, {_SAVED}, {_KNOBS}) -> ()", _MODULE, lambda *_: None)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, overwrite: bool, *knobs: Any) -> Tensor:
        losses, lse = _fwd(logits, targets, *knobs)
        ctx.save_for_backward(logits, targets, lse)
        ctx.overwrite, ctx.knobs = overwrite, knobs
        return losses.sum()  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, lse = ctx.saved_tensors
        if ctx.overwrite:
            logits = logits.detach()
            _bwd_(logits, targets, lse, scale, *ctx.knobs)
        else:
            logits = _bwd(logits, targets, lse, scale, *ctx.knobs)
        return logits, None, None, *(None for _ in ctx.knobs)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    overwrite: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """Sum of the negative log-likelihood of the labels that count, in nats [].

    Args:
        logits: Scores [..., W].
        targets: Labels [...], int64; -100 where none counts. One outside of the vocabulary is an error: on a GPU, where
            nobody looks before it runs, the loss becomes NaN.
        vocab_size: Leading columns that are scores of tokens, the others padding; None = all.
        softcap: Scores become softcap x tanh(score / softcap) (Gemma 2, arXiv:2408.00118); 0 = they stay.
        z_loss: Weight of the squared logarithm of the softmax's denominator (PaLM, arXiv:2204.02311, section 5).
        label_smoothing: Share of the label's probability that goes to all tokens alike (arXiv:1512.00567, section 7).
        overwrite: Whether the gradient may be written over the scores, which nobody must read after the backward pass;
            torch raises an error if somebody saved them. Only the kernel makes use of it.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        The loss [] in float32 (float64 for float64 scores).

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: `targets` or `vocab_size` does not fit `logits`.
    """
    width = logits.shape[-1]
    vocab_size = width if vocab_size is None else vocab_size
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets have shape {list(targets.shape)}; logits of shape {list(logits.shape)} need one each"
        )
    if not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size={vocab_size} must be between 1 and the {width} columns of logits")
    rows, labels, knobs = logits.flatten(0, -2), targets.flatten(), (vocab_size, softcap, z_loss, label_smoothing)
    if not runs_kernel(kernels, logits, columns=1):
        return reference.cross_entropy(rows, labels, *knobs).sum()
    return _CrossEntropy.apply(rows, labels, overwrite, *knobs)  # type: ignore[no-any-return]
