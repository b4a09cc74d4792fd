"""Pipeline parallelism over the same decoder: its blocks as stages, its weights under the same names."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from flows.model.attention import rotary
from flows.model.decoder import Decoder, DecoderLayer
from flows.training.batches import Batch
from flows.training.objectives import Loss, cross_entropy

CheckFinite = Callable[[float], None]
Labels = tuple[Tensor, Tensor, Tensor]
"""What the last stage needs besides the scores: input_ids [B, L], targets [B, L], loss_tokens []."""


class PipelineDecoder(PipelineModule):  # type: ignore[misc]  # ships no types
    """The decoder's parts in the order in which data flows; each rank keeps those of its stage.

    `named_weights` holds this stage's parameters by the names that they have in the decoder.

    Args:
        decoder: With the same weights on every rank.
        objective: Loss of the last stage's scores.
        stages: Ranks among which the layers are shared out, by number of parameters.
    """

    def __init__(self, decoder: Decoder, objective: Loss, stages: int) -> None:
        stack = decoder.model
        embedding: nn.Module | TiedLayerSpec = stack.embed_tokens
        head: nn.Module | TiedLayerSpec = decoder.lm_head
        if decoder.config.tie_word_embeddings:
            embedding = TiedLayerSpec("embed_tokens", _Embedding, stack.embed_tokens)
            head = TiedLayerSpec("embed_tokens", _Embedding, stack.embed_tokens, forward_fn=_scores)
        first = stack.first_position
        layers = [_Layer(cast(DecoderLayer, layer), stack.head_dim, stack.rope_theta, first) for layer in stack.layers]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layout
            super().__init__([embedding, *layers, stack.norm, head], num_stages=stages, loss_fn=self._mean_loss)
        self._objective = objective
        mine = {id(parameter) for parameter in self.parameters()}
        self.named_weights = {name: weight for name, weight in decoder.named_parameters() if id(weight) in mine}

    def _mean_loss(self, logits_BLV: Tensor, labels: Labels) -> Tensor:
        input_ids_BL, targets_BL, loss_tokens = labels
        loss = self._objective if self.training else cross_entropy
        return loss(logits_BLV, input_ids_BL, targets_BL) / loss_tokens


class _Embedding(nn.Module):
    """Holds the one matrix that the first stage embeds with and the last one scores with."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, input_ids_BL: Tensor) -> Tensor:
        return F.embedding(input_ids_BL, self.weight)


def _scores(embedding: _Embedding, x_BLD: Tensor) -> Tensor:
    return F.linear(x_BLD, embedding.weight)


class _Layer(nn.Module):
    """A decoder layer that works out positions by itself: stages hand on the residual stream alone."""

    def __init__(self, layer: DecoderLayer, head_dim: int, rope_theta: float, first_position: int) -> None:
        super().__init__()
        self.layer = layer
        self._head_dim, self._rope_theta, self._first = head_dim, rope_theta, first_position

    def forward(self, x_BLD: Tensor) -> Tensor:
        positions_BL = torch.arange(self._first, self._first + x_BLD.shape[1], device=x_BLD.device)[None]
        y_BLD: Tensor = self.layer(x_BLD, rotary(positions_BL, self._head_dim, self._rope_theta, x_BLD.dtype), None)
        return y_BLD


def pipeline_step(engine: PipelineEngine, batches: Iterator[Batch], check_finite: CheckFinite) -> float:
    """Runs one optimizer update; the mean loss over all ranks.

    Args:
        engine: Over a `PipelineDecoder`.
        batches: This rank's micro batches of the step, all of one shape.
        check_finite: Called on every rank with the mean loss after the last backward and before the update.
    """
    take_step = engine._take_model_step
    mean = math.nan

    def checked(*arguments: object) -> None:
        nonlocal mean
        mean = float(engine._aggregate_total_loss())
        check_finite(mean)
        take_step(*arguments)

    engine._take_model_step = checked  # DeepSpeed's schedule ends with the update and has no place for a look before
    try:
        engine.train_batch(_inputs_and_labels(iter(list(batches))))  # drawing them takes all ranks at once
    finally:
        engine._take_model_step = take_step
    return mean


def pipeline_loss(engine: PipelineEngine, batch: Batch) -> float | None:
    """Mean cross-entropy of one micro batch, on ranks of the last stage; None on others, which have to call it too."""
    losses = engine.eval_batch(
        _inputs_and_labels(iter([batch])), num_micro_batches=1, reduce_output=None, bcast_loss=False
    )
    return float(losses[0]) if engine.is_last_stage() else None


def gather_stages(engine: PipelineEngine) -> dict[str, Tensor]:
    """All stages' weights by name, on CPU, on rank 0; others get an empty dict."""
    mine = engine.module.named_weights
    listed: list[list[tuple[str, torch.Size, torch.dtype]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(listed, [(name, weight.shape, weight.dtype) for name, weight in mine.items()])
    rank, weights = dist.get_rank(), {}
    holders = {
        name: (holder, shape, dtype)
        for holder, names in reversed(list(enumerate(listed)))
        for name, shape, dtype in names or []
    }
    for name, (holder, shape, dtype) in sorted(holders.items()):
        if holder == rank == 0:
            weights[name] = mine[name].detach().cpu().clone()
        elif rank == 0:
            received = torch.empty(shape, dtype=dtype, device=engine.device)
            dist.recv(received, holder)
            weights[name] = received.cpu()
        elif rank == holder:
            dist.send(mine[name].detach(), 0)
    return weights


def _inputs_and_labels(batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Labels]]:
    for batch in batches:
        yield batch.input_ids_BL, (batch.input_ids_BL, batch.targets_BL, batch.loss_tokens)
