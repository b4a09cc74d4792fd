# Shape letters are upper case; calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""What a student learns of its teacher's layers: hidden states, and which tokens their attention finds alike.

Both are sums over the tokens that count of a mean over the rest, so that they do not depend on how a batch is cut.
Shape letters: B batch, L length, D width, A relation heads, E width of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.config.distillation import Distance, spread_layers
from flows.config.training import TrainingRun
from flows.data.packed import IGNORED
from flows.model.attention import allowed_keys
from flows.model.decoder import Decoder, DecoderLayer

PROJECTED = ("q_proj", "k_proj", "v_proj")


class Features(nn.Module):
    """The terms beside the scores', with the projections that are trained for them.

    Args:
        student: Its layers are watched while it trains.
        teacher: Frozen; it runs again only for micro batches that the loss of its scores has not shown it.
        run: Weights of the terms, and which layers.
    """

    def __init__(self, student: Decoder, teacher: Decoder, run: TrainingRun) -> None:
        super().__init__()
        self._hidden, self._relations, self._heads = run.hidden, run.relations, run.relations.heads
        students, teachers = len(student.model.layers), len(teacher.model.layers)
        mapped = run.hidden.layers or spread_layers(students, teachers)
        self._pairs = [*enumerate(mapped)] if run.hidden.weight else []
        self._last = (students - 1, range(teachers)[run.relations.layer])
        watched = [[student_layer for student_layer, _ in self._pairs], [layer for _, layer in self._pairs]]
        related = [[self._last[side]] if run.relations.weight else [] for side in range(2)]
        self._student = _Watch(student, watched[0], related[0])
        self._teacher = _Watch(teacher, watched[1], related[1])
        self._run_teacher = teacher.forward_hidden  # a method: a module would be trained, sharded and saved
        self.projections = _projections(student, teacher, len(self._pairs), run.seed)

    def forward(self, input_ids_BL: Tensor, targets_BL: Tensor, document_ids_BL: Tensor | None = None) -> Tensor:
        """Weighted sum of the terms [] of what the student's last forward pass gave.

        Args:
            input_ids_BL: What it was given.
            targets_BL: `IGNORED` where a token does not count.
            document_ids_BL: Number of each token's document.
        """
        if not self._teacher.seen:
            with torch.no_grad():
                self._run_teacher(input_ids_BL, document_ids_BL=document_ids_BL)
        ours, theirs = self._student.take(), self._teacher.take()
        counts_BL = targets_BL != IGNORED
        total = torch.zeros((), dtype=torch.float32, device=targets_BL.device)
        for number, (layer, other) in enumerate(self._pairs):
            x_BLD = ours[f"layer {layer}"]
            if len(self.projections):
                x_BLD = self.projections[number](x_BLD)
            losses_BL = hidden_losses(x_BLD, theirs[f"layer {other}"], self._hidden.distance)
            total = total + self._hidden.weight / len(self._pairs) * losses_BL.where(counts_BL, 0).sum()
        if self._relations.weight:
            allowed_BLL = _allowed(targets_BL, document_ids_BL)
            for name in PROJECTED:
                pair = (ours[f"{name} {self._last[0]}"], theirs[f"{name} {self._last[1]}"])
                losses_BL = relation_losses(*pair, self._heads, allowed_BLL)
                total = total + self._relations.weight / len(PROJECTED) * losses_BL.where(counts_BL, 0).sum()
        return total


def hidden_losses(x_BLD: Tensor, theirs_BLD: Tensor, distance: Distance) -> Tensor:
    """How far hidden states are from a teacher's [B, L], in float32 or wider."""
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    x_BLD, theirs_BLD = x_BLD.to(wide), theirs_BLD.to(wide)
    if distance == Distance.cosine:
        return 1 - F.cosine_similarity(x_BLD, theirs_BLD, dim=-1)
    return (x_BLD - theirs_BLD).square().mean(-1)


def relation_losses(x_BLD: Tensor, theirs_BLD: Tensor, heads: int, allowed_BLL: Tensor) -> Tensor:
    """KL(teacher || student) of each token's relations to those it may look at, mean over heads [B, L].

    A relation is softmax(x x^T / sqrt(width of a head)) (arXiv:2012.15828, section 3.1): it knows no widths, and stays
    as it is when vectors are turned within a head.

    Args:
        x_BLD: The student's queries, keys or values.
        theirs_BLD: The teacher's; widths may differ.
        heads: How many parts both are cut into.
        allowed_BLL: Which tokens each may look at, itself among them.
    """
    ours_BALL, theirs_BALL = (_relations(x, heads, allowed_BLL) for x in (x_BLD, theirs_BLD))
    return (theirs_BALL.exp() * (theirs_BALL - ours_BALL)).sum(-1).mean(1)


def _relations(x_BLD: Tensor, heads: int, allowed_BLL: Tensor) -> Tensor:
    """Logarithms of the relations [B, A, L, L]; finite, however small, where none is allowed."""
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    x_BALE = x_BLD.to(wide).view(*x_BLD.shape[:2], heads, -1).transpose(1, 2)
    scores_BALL = x_BALE @ x_BALE.transpose(-1, -2) * x_BALE.shape[-1] ** -0.5
    return scores_BALL.masked_fill(~allowed_BLL[:, None], torch.finfo(wide).min).log_softmax(-1)


def _allowed(targets_BL: Tensor, document_ids_BL: Tensor | None) -> Tensor:
    """Which tokens each may look at, bool [B, L, L]: those of its document up to itself."""
    given_BL = torch.zeros_like(targets_BL) if document_ids_BL is None else document_ids_BL
    return cast(Tensor, allowed_keys(None, given_BL))[:, 0]


def _projections(student: Decoder, teacher: Decoder, count: int, seed: int) -> nn.ModuleList:
    """A projection of the student's width to the teacher's for each pair; none where they are equal."""
    ours, theirs = student.config.hidden_size, teacher.config.hidden_size
    if ours == theirs:
        return nn.ModuleList()
    generator = torch.Generator().manual_seed(seed)
    made = nn.ModuleList(nn.Linear(ours, theirs, bias=False) for _ in range(count))
    like = next(student.parameters())
    for parameter in made.parameters():
        parameter.data = torch.empty(theirs, ours).normal_(0.0, ours**-0.5, generator=generator).to(like.dtype)
    return made


class _Watch:
    """What modules of a decoder gave in its last forward pass, by name; of one that trains, while it does."""

    def __init__(self, model: Decoder, hidden: Sequence[int], related: Sequence[int]) -> None:
        self.seen: dict[str, Tensor] = {}
        trains = any(parameter.requires_grad for parameter in model.parameters())
        modules = {f"layer {number}": model.model.layers[number] for number in hidden}
        for number in related:
            attention = cast(DecoderLayer, model.model.layers[number]).self_attn
            modules |= {f"{name} {number}": getattr(attention, name) for name in PROJECTED}
        for name, module in modules.items():
            module.register_forward_hook(self._keeps(name, trains))

    def take(self) -> dict[str, Tensor]:
        """What was seen, which is forgotten here."""
        seen, self.seen = self.seen, {}
        return seen

    def _keeps(self, name: str, trains: bool) -> Any:
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            if module.training or not trains:
                self.seen[name] = output

        return keep
