"""Losses of scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of positions that do not count, as in torch."""


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Losses [N] of scores [N, W]; arguments as in `kernels.cross_entropy.cross_entropy`."""
    scores = _scores(logits, vocab_size, softcap)
    losses = F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(scores, -1).square().where(targets != IGNORED, 0.0)
    return losses


def distillation(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 1.0,
    vocab_size: int | None = None,
    softcap: float = 0.0,
    teacher_softcap: float = 0.0,
) -> Tensor:
    """Losses [N] of a student's scores [N, W] and a teacher's; see `kernels.linear_distillation`."""
    scores = _scores(logits, vocab_size, softcap)
    log_q = F.log_softmax(scores / temperature, -1)
    log_p = F.log_softmax(_scores(teacher, scores.shape[-1], teacher_softcap) / temperature, -1)
    return _with_cross_entropy(log_p, log_q, scores, targets, divergence, beta, temperature, alpha)


def cached_distillation(
    logits: Tensor,
    targets: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail_log_mass: Tensor,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 1.0,
    vocab_size: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Losses [N] where of a teacher the K likeliest tokens are known; see `kernels.linear_distillation`."""
    scores = _scores(logits, vocab_size, softcap)
    log_q = F.log_softmax(scores / temperature, -1)  # over all tokens, before any is left out
    others = log_q.scatter(1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    coarse_q = torch.cat((log_q.gather(1, indices), others), -1)  # [N, K + 1]
    coarse_p = torch.cat((log_probs, tail_log_mass[:, None]), -1).to(coarse_q.dtype)
    return _with_cross_entropy(coarse_p, coarse_q, scores, targets, divergence, beta, temperature, alpha)


def _with_cross_entropy(
    log_p: Tensor,
    log_q: Tensor,
    scores: Tensor,
    targets: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
) -> Tensor:
    if divergence == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        apart = beta * _relative_entropy(log_p, log_m) + (1 - beta) * _relative_entropy(log_q, log_m)
    else:
        apart = _relative_entropy(*((log_p, log_q) if divergence == "forward_kl" else (log_q, log_p)))
    mixed = alpha * temperature**2 * apart.where(targets != IGNORED, 0.0)
    if alpha < 1:
        mixed = mixed + (1 - alpha) * F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")
    return mixed


def _relative_entropy(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of rows; what a does not expect adds nothing, whatever b expects."""
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)


def _scores(logits: Tensor, vocab_size: int | None, softcap: float) -> Tensor:
    wide = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(wide / softcap) if softcap else wide
