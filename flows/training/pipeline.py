"""Pipeline parallelism over the same decoder: its blocks as stages, its weights under the same names.

Stages hand on the residual stream [B, L, D], and with it the document ids [B, L] where documents are told apart.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from flows.config.training import TrainingRun
from flows.model.attention import angles, positions, visible_keys
from flows.model.decoder import Decoder, DecoderLayer, DecoderStack
from flows.training.batches import Batch
from flows.training.objectives import Loss, cross_entropy

CheckFinite = Callable[[float], None]
Carried = Tensor | tuple[Tensor, Tensor]
"""Token ids [B, L] or residual stream [B, L, D], alone or with document ids [B, L]."""


class PipelineDecoder(PipelineModule):  # type: ignore[misc]  # ships no types
    """The decoder's parts in the order in which data flows; each rank keeps those of its stage.

    `named_weights` holds this stage's parameters by the names that they have in the decoder.

    Args:
        decoder: With the same weights on every rank.
        objective: Loss of the last stage's hidden states and output projection.
        run: Number of stages, among which layers are shared out evenly: each has one, and so both kinds of weights.
    """

    def __init__(self, decoder: Decoder, objective: Loss, run: TrainingRun) -> None:
        stack = decoder.model
        embedding: nn.Module | TiedLayerSpec = _Embedding(stack.embed_tokens)
        head: nn.Module | TiedLayerSpec = _Head(decoder.lm_head)
        if decoder.config.tie_word_embeddings:
            embedding = TiedLayerSpec("embed_tokens", _Embedding, stack.embed_tokens)
            head = TiedLayerSpec("embed_tokens", _Embedding, stack.embed_tokens, forward_fn=_unscored)
        layers = [_Layer(cast(DecoderLayer, layer), stack) for layer in stack.layers]
        parts = [embedding, *layers, _Norm(stack.norm), head]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layout
            super().__init__(
                parts, num_stages=run.engine.pipeline_stages, loss_fn=self._mean_loss, partition_method="type:_Layer"
            )
        self._objective, self._kernels = objective, decoder.config.kernels.value
        self.tells_documents_apart, self.sequence_length = run.document_masks, run.sequence_length
        mine = {id(parameter) for parameter in self.parameters()}
        self.named_weights = {name: weight for name, weight in decoder.named_parameters() if id(weight) in mine}

    def _mean_loss(self, unscored: tuple[Tensor, Tensor], labels: tuple[Tensor, ...]) -> Tensor:
        input_ids_BL, targets_BL, loss_tokens, *rest = labels
        document_ids_BL = rest[0] if rest else None
        loss: Loss = self._objective if self.training else cross_entropy
        total = loss.from_hidden(*unscored, input_ids_BL, targets_BL, document_ids_BL, self._kernels)
        return total / loss_tokens


class _Embedding(nn.Embedding):
    """The matrix that the first stage embeds with and, where it is tied, the last one scores with."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight.detach())
        self.weight = embedding.weight  # the very parameter

    def forward(self, carried: Carried) -> Carried:  # type: ignore[override]
        if isinstance(carried, tuple):
            return super().forward(carried[0]), carried[1]
        return super().forward(carried)


def _unscored(embedding: _Embedding, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """What the loss makes scores of, some tokens at a time."""
    return x_BLD, embedding.weight


class _Layer(nn.Module):
    """A decoder layer that works out by itself what the decoder works out once for all layers."""

    def __init__(self, layer: DecoderLayer, stack: DecoderStack) -> None:
        super().__init__()
        self.layer = layer
        self._head_dim, self._rope_theta, self._first = stack.head_dim, stack.rope_theta, stack.first_position
        self._kernels = stack.kernels

    def forward(self, carried: Carried) -> Carried:
        x_BLD, document_ids_BL = carried if isinstance(carried, tuple) else (carried, None)
        positions_BL = positions(x_BLD, None, document_ids_BL, self._first)
        rotation = angles(positions_BL, self._head_dim, self._rope_theta)
        visible = visible_keys(x_BLD, self._head_dim, self._kernels, None, document_ids_BL)
        y_BLD = cast(Tensor, self.layer(x_BLD, rotation, visible))
        return y_BLD if document_ids_BL is None else (y_BLD, document_ids_BL)


class _Norm(nn.Module):
    """The final norm; nobody after it looks at documents."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, carried: Carried) -> Tensor:
        return cast(Tensor, self.norm(carried[0] if isinstance(carried, tuple) else carried))


class _Head(nn.Module):
    """The output projection, under a name that optimizers know it by."""

    def __init__(self, lm_head: nn.Linear) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        return x_BLD, self.lm_head.weight


def merge_groups(optimizer: torch.optim.Optimizer) -> None:
    """Makes one parameter group of those with the same decay, so that all stages have as many.

    DeepSpeed adds up the squares of each group's gradients over stages, and waits for ever for a group that some lack.
    """
    merged: dict[float, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        merged.setdefault(group["weight_decay"], {**group, "params": []})["params"] += group["params"]
    optimizer.param_groups[:] = merged.values()


def pipeline_step(engine: PipelineEngine, batches: Iterable[Batch], check_finite: CheckFinite) -> float:
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
        engine.train_batch(_inputs_and_labels(engine, batches))
    finally:
        engine._take_model_step = take_step
    return mean


def pipeline_loss(engine: PipelineEngine, batch: Batch) -> float | None:
    """Mean cross-entropy of one micro batch, on ranks of the last stage; None on others, which have to call it too."""
    data = _inputs_and_labels(engine, [batch])
    losses = engine.eval_batch(data, num_micro_batches=1, reduce_output=None, bcast_loss=False)
    return float(losses[0]) if engine.is_last_stage() else None


def _inputs_and_labels(
    engine: PipelineEngine, batches: Iterable[Batch]
) -> Iterator[tuple[Carried, tuple[Tensor, ...]]]:
    for batch in batches:
        labels = (batch.input_ids_BL, batch.targets_BL, batch.loss_tokens)
        if engine.module.tells_documents_apart:  # in each micro batch: stages expect tensors of one shape
            ids = batch.document_ids_BL
            if ids is None:
                ids = batch.input_ids_BL.new_zeros((len(batch.input_ids_BL), engine.module.sequence_length))
            yield (batch.input_ids_BL, ids), (*labels, ids)
        else:
            yield batch.input_ids_BL, labels
