"""Distillation fused with the output projections, as registered operations: see `kernels.head_chunks`.

What a chunk is compared with is in `kernels.linear_distillation_triton`; without kernels it is plain torch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.chunk_sizes import DISTILLATION_SHARE
from kernels.dispatch import KernelError, runs_kernel
from kernels.head_chunks import (
    check_projection,
    chunk_tokens,
    differentiable,
    empty_sums,
    scores_buffer,
    sum_over_chunks,
)
from kernels.loss_rows import cached_distillation_rows, distillation_rows
from kernels.registration import register

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
MAX_KEPT = 1024
"""Most tokens of a cached teacher that a kernel holds in registers."""


class TeacherHead(NamedTuple):
    """A teacher whose scores are computed."""

    x: Tensor
    """Hidden states [..., Dt]."""
    weight: Tensor
    """Output projection [Wt, Dt] in the dtype of `x`; only the student's vocabulary counts."""
    softcap: float = 0.0
    """Scores become softcap x tanh(score / softcap); 0 = they stay."""


class CachedTeacher(NamedTuple):
    """A teacher of whom the K likeliest tokens were kept, of the distribution softened by the temperature already."""

    indices: Tensor
    """Tokens [..., K], int64, no two the same."""
    log_probs: Tensor
    """Logarithms of their probabilities [..., K], of the softmax over all tokens."""
    tail_log_mass: Tensor
    """Logarithm of the probability of all other tokens together [...]; minus infinity if there is none."""


def linear_distillation_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    teacher_softcap: float,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    vocab_size: int,
    softcap: float,
    chunk: int,
    wants_dx: bool,
    wants_dweight: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses [] and its gradients for `x` [N, D] and `weight` [W, D], empty where not wanted."""
    knobs = divergence, beta, temperature, alpha, softcap, teacher_softcap, wants_dx or wants_dweight
    buffer = scores_buffer(min(chunk, len(x)), vocab_size, teacher_x)
    projection = teacher_weight[:vocab_size].t()

    def rows(scores: Tensor, tokens: slice) -> tuple[Tensor, Tensor | None]:
        theirs = torch.mm(teacher_x[tokens], projection, out=buffer[: len(scores)])
        if not kernel:
            return distillation_rows(scores, targets[tokens], theirs, *knobs)
        from kernels.linear_distillation_triton import against_logits

        losses = against_logits(scores, targets[tokens], theirs, *knobs)
        return losses, scores if knobs[-1] else None

    return sum_over_chunks(x, weight, vocab_size, chunk, rows, wants_dx, wants_dweight)


def linear_cached_distillation_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail_log_mass: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    vocab_size: int,
    softcap: float,
    chunk: int,
    wants_dx: bool,
    wants_dweight: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_distillation_fwd`, from what was kept of a teacher."""
    knobs = divergence, beta, temperature, alpha, softcap, wants_dx or wants_dweight

    def rows(scores: Tensor, tokens: slice) -> tuple[Tensor, Tensor | None]:
        labels, ids, logs, tail = targets[tokens], indices[tokens], log_probs[tokens], tail_log_mass[tokens]
        if not kernel:
            return cached_distillation_rows(scores, labels, ids, logs, tail, *knobs)
        from kernels.linear_distillation_triton import against_cache

        losses = against_cache(scores, labels, ids, logs, tail, *knobs)
        return losses, scores if knobs[-1] else None

    return sum_over_chunks(x, weight, vocab_size, chunk, rows, wants_dx, wants_dweight)


_STUDENT = "Tensor x, Tensor weight, Tensor targets"
_KNOBS = (
    "str divergence, float beta, float temperature, float alpha, int vocab_size, float softcap, int chunk, "
    "bool wants_dx, bool wants_dweight, bool kernel"
)
_dense_fwd = register(
    f"linear_distillation_fwd({_STUDENT}, Tensor teacher_x, Tensor teacher_weight, float teacher_softcap, {_KNOBS}) "
    "-> (Tensor, Tensor, Tensor)",
    "kernels.linear_distillation",
    empty_sums,
)
_cached_fwd = register(
    f"linear_cached_distillation_fwd({_STUDENT}, Tensor indices, Tensor log_probs, Tensor tail_log_mass, {_KNOBS}) "
    "-> (Tensor, Tensor, Tensor)",
    "kernels.linear_distillation",
    empty_sums,
)


def linear_distillation(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: TeacherHead | CachedTeacher,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 1.0,
    vocab_size: int | None = None,
    softcap: float = 0.0,
    tokens_at_once: int | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Sum of alpha x T^2 x D(teacher / T, student / T) + (1 - alpha) x cross-entropy, in nats [] (arXiv:1503.02531).

    The student's scores are x @ weight.T; neither model's exist for all tokens at once. A cached teacher is compared
    after the softmax over all tokens: the K kept ones and the rest as one more outcome, loss and gradient exact for
    those K + 1. The gradients are computed on the way forward, where torch records them, and can be had once.

    Args:
        x: The student's hidden states [..., D].
        weight: Its output projection [W, D] in the dtype of `x`.
        targets: Labels [...], int64; -100 where nothing counts. One outside of the vocabulary is an error, or NaN.
        teacher: Hidden states and projection, or what was kept of the distribution. Gets no gradient.
        divergence: D: `forward_kl` is KL(teacher || student), `reverse_kl` KL(student || teacher), `jsd` the
            generalized Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m) of teacher p and student q,
            from m = beta p + (1 - beta) q (GKD, arXiv:2306.13649, equation 1).
        beta: Weight of the teacher in the mean distribution of `jsd`, between 0 and 1, both excluded.
        temperature: T; divides both sets of scores. The factor T^2 keeps the size of the gradient.
        alpha: Weight of the divergence, in [0, 1].
        vocab_size: Leading rows of `weight` that score tokens, the others padding; None = all.
        softcap: The student's scores become softcap x tanh(score / softcap); 0 = they stay.
        tokens_at_once: Tokens whose scores exist together; None = chosen by a bound on memory.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        The loss [] in float32 (float64 for float64 inputs).

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: Shapes, dtypes or numbers do not fit.
    """
    vocab_size = len(weight) if vocab_size is None else vocab_size
    check_projection(x, weight, targets, vocab_size)
    _check(teacher, targets, vocab_size, divergence, beta, temperature, alpha)
    kernel = runs_kernel(kernels, x, columns=1)
    rows, labels = x.reshape(-1, x.shape[-1]), targets.reshape(-1).contiguous()
    chunk = tokens_at_once or chunk_tokens(len(rows), rows, DISTILLATION_SHARE)
    knobs = (divergence, beta, temperature, alpha, vocab_size, softcap, chunk)
    if isinstance(teacher, TeacherHead):
        kernel = kernel and runs_kernel(kernels, teacher.x, columns=1)
        theirs: tuple[Any, ...] = (
            teacher.x.detach().reshape(-1, teacher.x.shape[-1]),
            teacher.weight.detach(),
            teacher.softcap,
        )
    else:
        kept = teacher.indices.shape[-1]
        if kernel and kept > MAX_KEPT:
            if kernels == "triton":
                raise KernelError(
                    f'kernels="triton" is not possible: kernels hold up to {MAX_KEPT} tokens of a cached teacher in '
                    f'registers, not {kept}. Use "auto" or "reference".'
                )
            kernel = False
        theirs = (
            teacher.indices.reshape(-1, kept).contiguous(),
            teacher.log_probs.detach().reshape(-1, kept).contiguous(),
            teacher.tail_log_mass.detach().reshape(-1).contiguous(),
        )
    operation = _dense_fwd if isinstance(teacher, TeacherHead) else _cached_fwd
    return differentiable(operation, rows, weight, (labels, *theirs, *knobs, kernel))


def _check(
    teacher: TeacherHead | CachedTeacher,
    targets: Tensor,
    vocab_size: int,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} must be one of {', '.join(DIVERGENCES)}")
    if not (0 < beta < 1 and temperature > 0 and 0 <= alpha <= 1):
        raise ValueError(
            f"beta={beta} must be between 0 and 1, temperature={temperature} above 0, alpha={alpha} in [0, 1]"
        )
    if isinstance(teacher, TeacherHead):
        width = teacher.x.shape[-1]
        if teacher.weight.shape[1:] != (width,) or len(teacher.weight) < vocab_size:
            raise ValueError(
                f"the teacher's weight has shape {list(teacher.weight.shape)}; a vocabulary of {vocab_size} and its "
                f"hidden states of shape {list(teacher.x.shape)} need [{vocab_size} or more, {width}]"
            )
        shapes = [teacher.x.shape[:-1]]
    else:
        shapes = [teacher.indices.shape[:-1], teacher.log_probs.shape[:-1], teacher.tail_log_mass.shape]
        if teacher.indices.shape != teacher.log_probs.shape:
            raise ValueError(
                f"indices have shape {list(teacher.indices.shape)}, log_probs {list(teacher.log_probs.shape)}; "
                "each token needs its own"
            )
    for shape in shapes:
        if shape != targets.shape:
            raise ValueError(f"the teacher has tokens of shape {list(shape)}, the student of {list(targets.shape)}")
