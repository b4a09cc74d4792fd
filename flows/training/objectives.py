"""Objectives are loss functions: the loop does not know which one it minimizes.

Where a model's scores are nothing but hidden states times a matrix, a loss takes those two and never makes the scores
of all tokens (`kernels.head_chunks`); else it takes the scores. `scoring_head` decides, for each forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from flows.config.distillation import Divergence
from flows.model.decoder import Decoder, OutputHead
from flows.training.cache_records import unpack_records
from flows.training.features import Features
from flows.training.record_layout import RecordLayout
from kernels import reference
from kernels.cross_entropy import cross_entropy as cross_entropy_of_scores
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_distillation import CachedTeacher, TeacherHead, linear_distillation

CHUNK_TOKENS = 256
"""Tokens whose distributions are compared at once: several passes over [tokens, vocab] stay in a processor's cache."""


class Loss(Protocol):
    """What is minimized: a sum over the targets that are not `IGNORED` []."""

    def __call__(
        self,
        logits_BLV: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of scores, which the backward pass may overwrite."""

    def from_hidden(
        self,
        x_BLD: torch.Tensor,
        weight_VD: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
        kernels: str = "auto",
    ) -> torch.Tensor:
        """The loss of the scores that the hidden states have in the output projection."""


class CrossEntropy:
    """Negative log-likelihood of the targets that count, in nats."""

    def __call__(
        self,
        logits_BLV: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """From scores []."""
        return cross_entropy_of_scores(logits_BLV, targets_BL, overwrite=True)

    def from_hidden(
        self,
        x_BLD: torch.Tensor,
        weight_VD: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
        kernels: str = "auto",
    ) -> torch.Tensor:
        """From hidden states and output projection []."""
        return linear_cross_entropy(x_BLD, weight_VD, targets_BL, kernels=kernels)


cross_entropy = CrossEntropy()


@dataclass(frozen=True)
class _Mix:
    """How the teacher's distribution and the data share a loss, under the names that the kernels have for it."""

    divergence: str
    beta: float
    temperature: float
    alpha: float

    def summed(self, loss: Callable[..., torch.Tensor], *of_tokens: torch.Tensor) -> torch.Tensor:
        """A loss of tokens [N, ...], computed for some of them at a time, as one sum []."""
        parts = zip(*(torch.split(one, CHUNK_TOKENS) for one in of_tokens), strict=True)
        return torch.cat([loss(*part, **asdict(self)) for part in parts]).sum()


class Distillation:
    """A loss that mixes the teacher's softened distribution with the data (arXiv:1503.02531).

    alpha x T^2 x D(teacher / T, student / T) + (1 - alpha) x cross-entropy. The factor T^2 keeps the size of the
    gradient independent of the temperature.

    Args:
        teacher: Frozen model with the student's vocabulary: input_ids [batch, length] -> logits [batch, length, vocab].
        temperature: T; both sets of logits are divided by it.
        alpha: Weight of the teacher, in [0, 1].
        divergence: D.
        beta: Weight of the teacher in the mean distribution that `jsd` measures from.
    """

    def __init__(
        self,
        teacher: nn.Module,
        temperature: float,
        alpha: float,
        divergence: Divergence = Divergence.forward_kl,
        beta: float = 0.5,
    ) -> None:
        # neither trained, sharded nor saved: a module would be part of what holds the loss
        self._teacher = teacher.eval().requires_grad_(False)
        self._mix = _Mix(divergence.value, beta, temperature, alpha)

    def __call__(
        self,
        logits_BLV: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """From scores []."""
        with torch.no_grad():
            teacher_BLV = scores(self._teacher, input_ids_BL, document_ids_BL)
        students, targets, teachers = logits_BLV.flatten(0, 1), targets_BL.flatten(), teacher_BLV.flatten(0, 1)
        return self._mix.summed(reference.distillation, students, targets, teachers)

    def from_hidden(
        self,
        x_BLD: torch.Tensor,
        weight_VD: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
        kernels: str = "auto",
    ) -> torch.Tensor:
        """From hidden states and output projection []; a teacher that has no such two makes both models' scores."""
        head = scoring_head(self._teacher)
        if head is None:
            return self(F.linear(x_BLD, weight_VD), input_ids_BL, targets_BL, document_ids_BL)
        with torch.no_grad():
            theirs_BLD = hidden_states(cast(Decoder, self._teacher), input_ids_BL, document_ids_BL)
        teacher = TeacherHead(theirs_BLD, head.weight)
        return linear_distillation(x_BLD, weight_VD, targets_BL, teacher, **asdict(self._mix), kernels=kernels)


class CachedDistillation:
    """The loss of `Distillation`, from what was kept of the teacher's distributions.

    Compared are the K kept tokens and all others as one outcome. With forward_kl the gradient of a token's scores is
    off by what the others pull among themselves alone: at most 2 alpha T times the teacher's probability of them all
    at temperature T, as a sum of absolute values, and no less is lost of the divergence than of nothing: it is never
    above the dense one.

    Args:
        layout: Of the records.
        temperature: As in `Distillation`, 1 or more.
        alpha: As there.
        divergence: As there.
        beta: As there.
    """

    def __init__(
        self,
        layout: RecordLayout,
        temperature: float,
        alpha: float,
        divergence: Divergence = Divergence.forward_kl,
        beta: float = 0.5,
    ) -> None:
        self._layout, self._mix = layout, _Mix(divergence.value, beta, temperature, alpha)
        self._records_BLR: torch.Tensor | None = None

    def of(self, records_BLR: torch.Tensor) -> CachedDistillation:
        """The loss of one micro batch, from the records of its tokens, uint8 [batch, length, bytes]."""
        loss = copy(self)
        loss._records_BLR = records_BLR
        return loss

    def __call__(
        self,
        logits_BLV: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """From scores []."""
        students, targets = logits_BLV.flatten(0, 1), targets_BL.flatten()
        return self._mix.summed(reference.cached_distillation, students, targets, *self._teacher())

    def from_hidden(
        self,
        x_BLD: torch.Tensor,
        weight_VD: torch.Tensor,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
        kernels: str = "auto",
    ) -> torch.Tensor:
        """From hidden states and output projection []."""
        x_ND, targets_N = x_BLD.flatten(0, 1), targets_BL.flatten()
        return linear_distillation(x_ND, weight_VD, targets_N, self._teacher(), **asdict(self._mix), kernels=kernels)

    def _teacher(self) -> CachedTeacher:
        assert self._records_BLR is not None, "a cached loss without the micro batch's records"
        return CachedTeacher(*unpack_records(self._layout, self._records_BLR.flatten(0, 1), self._mix.temperature))


def scoring_head(model: nn.Module) -> OutputHead | None:
    """The output projection of a model whose scores are nothing but hidden states times its weight; else None.

    That is our decoder as long as its head is what it was made with. One with an adapter, one that was quantized or cut
    over ranks, and models of the transformers library, whose scores may be scaled or shifted, make their scores.
    """
    head = model.lm_head if isinstance(model, Decoder) else None
    return head if type(head) is OutputHead else None


def hidden_states(model: Decoder, input_ids_BL: torch.Tensor, document_ids_BL: torch.Tensor | None) -> torch.Tensor:
    """What the model's output projection turns into scores [batch, length, hidden size]."""
    return model.forward_hidden(input_ids_BL, document_ids_BL=document_ids_BL)


def scores(model: nn.Module, input_ids_BL: torch.Tensor, document_ids_BL: torch.Tensor | None) -> torch.Tensor:
    """The model's scores [batch, length, vocab]; one that knows no document ids need not, where there are none."""
    if document_ids_BL is None:
        return cast(torch.Tensor, model(input_ids_BL))
    return cast(torch.Tensor, model(input_ids_BL, document_ids_BL=document_ids_BL))


class LossModule(nn.Module):
    """The model with its loss, as one module: the loss is computed inside the engine's forward, where ZeRO-3 has the
    weights gathered.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.penalty: Callable[[], torch.Tensor] | None = None
        """What the last forward adds to the training loss besides."""
        self.own_loss: Loss | None = None
        """Of text that the student wrote itself."""
        self.wrote_itself = False
        """Whether the batches of this step are such text."""
        self.features: Features | None = None
        """What else a student learns of its teacher's layers; trained with it, and no part of what is saved."""

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        loss_tokens: torch.Tensor,
        document_ids_BL: torch.Tensor | None = None,
        records_BLR: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss to minimize while training, cross-entropy while evaluating: the sum divided by `loss_tokens` []."""
        loss: Loss = self._training_loss() if self.training else cross_entropy
        if records_BLR is not None:
            loss = cast(CachedDistillation, loss).of(records_BLR)
        head = scoring_head(self.model)
        if head is None:
            logits_BLV = scores(self.model, input_ids_BL, document_ids_BL)
            total = loss(logits_BLV, input_ids_BL, targets_BL, document_ids_BL)
        else:
            model = cast(Decoder, self.model)
            kernels = model.config.kernels.value
            # called, not read: ZeRO-3 gathers a weight while the module that holds it runs, forward and backward
            total = head(
                hidden_states(model, input_ids_BL, document_ids_BL),
                loss=lambda x_BLD, weight_VD: loss.from_hidden(
                    x_BLD, weight_VD, input_ids_BL, targets_BL, document_ids_BL, kernels
                ),
            )
        if self.features is not None and self.training:
            total = total + self.features(input_ids_BL, targets_BL, document_ids_BL)
        mean = total / loss_tokens
        return mean + self.penalty() if self.penalty and self.training else mean

    def _training_loss(self) -> Loss:
        if not self.wrote_itself:
            return self.loss
        assert self.own_loss is not None, "a student's own text without a loss for it"
        return self.own_loss
