"""Unstructured pruning: single weights become zero. Tensors keep their size: zeros are stored like other numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flows.config.prune import PruneConfig, SparsityMethod
from flows.model.decoder import Decoder

GROUP = 4
"""Weights of a group of `2:4`."""


@dataclass(frozen=True)
class LayerSparsity:
    """What became of one matrix."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    """Share of zeros."""
    skipped_reason: str | None
    """Why it was left as it is."""


@torch.no_grad()
def prune_weights_(
    model: Decoder, config: PruneConfig, input_squares: Mapping[str, Tensor]
) -> tuple[LayerSparsity, ...]:
    """Sets weights of the layers' matrices to zero, in place.

    Args:
        model: The decoder.
        config: How many, by which method, in which pattern.
        input_squares: Mean square of each input, by the name of the linear layer; read by `wanda` only.

    Returns:
        A row for every matrix, embeddings and output projection too, which stay as they are.
    """
    matrices = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)}
    scores = {
        name: layer.weight.abs().double()
        * (input_squares[name].sqrt().to(layer.weight.device) if config.method == SparsityMethod.wanda else 1.0)
        for name, layer in matrices.items()
        if name.startswith("model.layers.") and isinstance(layer.weight, Tensor)
    }
    everywhere = (
        _smallest(torch.cat([score.flatten() for score in scores.values()]), config.sparsity)
        if config.method == SparsityMethod.magnitude_global
        else None
    )
    report, first = [], 0
    for name, layer in matrices.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        reason = None if name in scores else "every token meets it at both ends of the model"
        if name in scores:
            score = scores[name]
            if config.pattern is not None and score.shape[1] % GROUP:
                reason = f"its {score.shape[1]} columns are no multiple of {GROUP}"
            elif everywhere is not None:
                weight[everywhere[first : first + score.numel()].view_as(score)] = 0.0
            else:
                weight[_zeros(score, config)] = 0.0
            first += score.numel()
        report.append(LayerSparsity(name, tuple(weight.shape), float((weight == 0).double().mean()), reason))
    return tuple(report)


def _zeros(score: Tensor, config: PruneConfig) -> Tensor:
    """Which weights of a matrix are to be zero, bool [N, K]."""
    if config.pattern is not None:
        return _smallest(score.view(score.shape[0], -1, GROUP), config.sparsity).view_as(score)
    if config.method == SparsityMethod.wanda:
        return _smallest(score, config.sparsity)
    return _smallest(score.flatten(), config.sparsity).view_as(score)


def _smallest(score: Tensor, share: float) -> Tensor:
    """Marks the smallest scores of each row [..., K], exactly round(share x K) of them; of equal ones the first."""
    order = score.argsort(dim=-1, stable=True)[..., : round(share * score.shape[-1])]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)
