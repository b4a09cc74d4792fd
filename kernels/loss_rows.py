"""Losses of rows of scores, and their gradients: what a chunk is computed with where no kernel runs.

The same mathematics as `kernels.reference`, differentiated by hand, so that a few arrays of a chunk's size suffice.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import IGNORED


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, softcap: float, z_loss: float, label_smoothing: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [C] of scores [C, V], and their sum's gradient [C, V] in the dtype of the scores.

    Args:
        logits: Scores.
        targets: Labels [C], int64; -100 where none counts.
        softcap: See `kernels.linear_cross_entropy`, as for the others.
        z_loss: Weight of the squared logarithm of the denominator.
        label_smoothing: Share that goes to all tokens.
        with_gradient: Whether the gradient is wanted.
    """
    counts, labels = _labels(targets)
    scores = _capped(logits, softcap)
    log_q = F.log_softmax(scores, -1)
    losses = (label_smoothing - 1) * log_q.gather(1, labels).squeeze(1)
    if label_smoothing:
        losses -= label_smoothing * log_q.mean(-1)
    lse = torch.logsumexp(scores, -1) if z_loss else None
    if lse is not None:
        losses += z_loss * lse.square()
    losses = losses.where(counts, 0.0)
    if not with_gradient:
        return losses, None
    gradient = log_q.exp_()
    if lse is not None:
        gradient *= 1 + 2 * z_loss * lse[:, None]
    if label_smoothing:
        gradient -= label_smoothing / logits.shape[1]
    gradient.scatter_add_(1, labels, gradient.new_full((), label_smoothing - 1).expand(labels.shape))
    return losses, _through_cap(gradient, scores, softcap, counts).to(logits.dtype)


def distillation_rows(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    softcap: float,
    teacher_softcap: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses [C] of a student's scores [C, V] and a teacher's [C, V], and the gradient of the student's.

    Args:
        logits: The student's scores.
        targets: Labels [C], int64; -100 where none counts.
        teacher: The teacher's scores.
        divergence: See `kernels.linear_distillation`, as for the others.
        beta: Weight of the teacher in the mean distribution.
        temperature: Divides both sets of scores.
        alpha: Weight of the divergence.
        softcap: Of the student.
        teacher_softcap: Of the teacher.
        with_gradient: Whether the gradient is wanted.
    """
    scores = _capped(logits, softcap)
    log_q = F.log_softmax(scores / temperature if temperature != 1 else scores, -1)
    theirs = _capped(teacher, teacher_softcap)
    log_p = F.log_softmax(theirs / temperature if temperature != 1 else theirs, -1)
    apart, slope = _divergence(log_p, log_q, divergence, beta)
    gradient = None
    if with_gradient:
        total = slope.sum(-1, keepdim=True)
        gradient = slope.addcmul_(log_q.exp_(), total, value=-1).mul_(alpha * temperature)
    return _mixed(apart, gradient, logits, scores, targets, temperature, alpha, softcap)


def cached_distillation_rows(
    logits: Tensor,
    targets: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail_log_mass: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    softcap: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses [C] of a student's scores [C, V] where K of a teacher's probabilities are known, and their gradient.

    Args:
        logits: The student's scores.
        targets: Labels [C], int64; -100 where none counts.
        indices: The K tokens [C, K], int64.
        log_probs: Logarithms of their probabilities [C, K].
        tail_log_mass: Logarithm of the probability of all others together [C].
        divergence: See `kernels.linear_distillation`, as for the others.
        beta: Weight of the teacher in the mean distribution.
        temperature: Divides the scores.
        alpha: Weight of the divergence.
        softcap: Of the student.
        with_gradient: Whether the gradient is wanted.
    """
    scores = _capped(logits, softcap)
    log_q = F.log_softmax(scores / temperature if temperature != 1 else scores, -1)
    kept = log_q.gather(1, indices)
    others = log_q.scatter(1, indices, -torch.inf)
    tail = others.logsumexp(-1, keepdim=True)
    coarse_q = torch.cat((kept, tail), -1)
    coarse_p = torch.cat((log_probs, tail_log_mass[:, None]), -1).to(coarse_q.dtype)
    apart, slope = _divergence(coarse_p, coarse_q, divergence, beta)
    gradient = None
    if with_gradient:
        total = slope.sum(-1, keepdim=True)
        # what pulls at the tail is shared out among its tokens by the student's own probabilities
        inside_tail = others.sub_(tail.clamp(min=torch.finfo(tail.dtype).min)).exp_()
        gradient = inside_tail.mul_(slope[:, -1:]).scatter_(1, indices, slope[:, :-1])
        gradient = gradient.addcmul_(log_q.exp_(), total, value=-1).mul_(alpha * temperature)
    return _mixed(apart, gradient, logits, scores, targets, temperature, alpha, softcap)


def _divergence(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """D(p, q) [C], and q dD/dq [C, V]: minus q times its sum, that is the gradient for the scores of q."""
    if divergence == "forward_kl":
        p = log_p.exp()
        return _expected(p, log_p - log_q), p.neg_()
    q = log_q.exp()
    if divergence == "reverse_kl":
        apart = _times(q, log_q - log_p)
        return apart.sum(-1), apart
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    apart = _times(q, log_q - log_m).mul_(1 - beta)
    return beta * _expected(log_p.exp(), log_p - log_m) + apart.sum(-1), apart


def _times(probability: Tensor, value: Tensor) -> Tensor:
    """Their product, zero where nothing is expected, whatever the value."""
    return value.mul_(probability).masked_fill_(probability == 0, 0.0)


def _expected(probability: Tensor, value: Tensor) -> Tensor:
    return _times(probability, value).sum(-1)


def _mixed(
    apart: Tensor,
    gradient: Tensor | None,
    logits: Tensor,
    scores: Tensor,
    targets: Tensor,
    temperature: float,
    alpha: float,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """The divergence and its gradient, scaled already, mixed with cross-entropy."""
    counts, labels = _labels(targets)
    losses = alpha * temperature**2 * apart
    if alpha < 1:
        log_q = F.log_softmax(scores, -1)
        losses -= (1 - alpha) * log_q.gather(1, labels).squeeze(1)
        if gradient is not None:
            gradient.add_(log_q.exp_(), alpha=1 - alpha)
            gradient.scatter_add_(1, labels, gradient.new_full((), alpha - 1).expand(labels.shape))
    losses = losses.where(counts, 0.0)
    if gradient is None:
        return losses, None
    return losses, _through_cap(gradient, scores, softcap, counts).to(logits.dtype)


def _labels(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels count [C], and labels that can be looked up [C, 1]."""
    counts = targets != IGNORED
    return counts, targets.where(counts, 0)[:, None]


def _capped(logits: Tensor, softcap: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.tanh(wide / softcap).mul_(softcap) if softcap else wide


def _through_cap(gradient: Tensor, scores: Tensor, softcap: float, counts: Tensor) -> Tensor:
    """The gradient before the cap, zero in rows that do not count."""
    if softcap:
        gradient = gradient.mul_(1 - (scores / softcap).square_())
    return gradient.masked_fill_(~counts[:, None], 0.0)
