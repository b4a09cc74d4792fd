"""Objectives are loss functions: the loop does not know which one it minimizes."""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from flows.training.batches import IGNORED

CHUNK_TOKENS = 256
"""Tokens whose distributions are compared at once: several passes over [tokens, vocab] stay in a processor's cache."""


class Loss(Protocol):
    """What is minimized."""

    def __call__(
        self,
        logits_BLV: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss, summed over the targets that are not `IGNORED` []."""


def cross_entropy(
    logits_BLV: torch.Tensor,
    input_ids_BL: torch.Tensor,
    targets_BL: torch.Tensor,
    document_ids_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the negative log-likelihood of the targets that count, in nats []."""
    return F.cross_entropy(
        _at_least_float32(logits_BLV).flatten(0, 1), targets_BL.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def distillation(teacher: nn.Module, temperature: float, alpha: float) -> Loss:
    """A loss that mixes the teacher's softened distribution with the data (arXiv:1503.02531).

    alpha x T^2 x KL(teacher / T || student / T) + (1 - alpha) x cross-entropy. The factor T^2 keeps the size of the
    gradient independent of the temperature.

    Args:
        teacher: Frozen model with the student's vocabulary: input_ids [batch, length] -> logits [batch, length, vocab].
        temperature: T; both sets of logits are divided by it.
        alpha: Weight of the teacher, in [0, 1].
    """
    teacher.eval().requires_grad_(False)

    def loss(
        logits_BLV: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with torch.no_grad():
            teacher_BLV = scores(teacher, input_ids_BL, document_ids_BL)
        divergence = kl_divergence(logits_BLV, teacher_BLV, targets_BL, temperature)
        return alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy(logits_BLV, input_ids_BL, targets_BL)

    return loss


def kl_divergence(
    student_BLV: torch.Tensor, teacher_BLV: torch.Tensor, targets_BL: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Sum of KL(teacher || student) of the softened distributions, where the target counts, in nats []."""
    total = student_BLV.new_zeros((), dtype=torch.promote_types(student_BLV.dtype, torch.float32))
    students, teachers, counts = student_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1), (targets_BL != IGNORED).flatten()
    for first in range(0, len(students), CHUNK_TOKENS):
        chunk = slice(first, first + CHUNK_TOKENS)
        student = F.log_softmax(_at_least_float32(students[chunk]) / temperature, -1)
        teacher = F.log_softmax(_at_least_float32(teachers[chunk]) / temperature, -1)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        total = total + divergence.where(counts[chunk], 0.0).sum()
    return total


def scores(model: nn.Module, input_ids_BL: torch.Tensor, document_ids_BL: torch.Tensor | None) -> torch.Tensor:
    """The model's scores [batch, length, vocab]; one that knows no document ids need not, where there are none."""
    if document_ids_BL is None:
        return cast(torch.Tensor, model(input_ids_BL))
    return cast(torch.Tensor, model(input_ids_BL, document_ids_BL=document_ids_BL))


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class LossModule(nn.Module):
    """The model with its loss, as one module: the loss is computed inside the engine's forward, where ZeRO-3 has the
    weights gathered.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss  # a closure, so that a teacher is neither trained, sharded nor saved

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        loss_tokens: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss to minimize while training, cross-entropy while evaluating: the sum divided by `loss_tokens` []."""
        logits_BLV = scores(self.model, input_ids_BL, document_ids_BL)
        loss = self._loss if self.training else cross_entropy
        return loss(logits_BLV, input_ids_BL, targets_BL, document_ids_BL) / loss_tokens
