# torch.Tensor.register_hook is untyped:
# mypy: disable-error-code="no-untyped-call"
"""Gradual magnitude pruning (arXiv:1710.01878) inside the training loop.

The zeros themselves are all that it remembers: they are in every checkpoint, so that a resumed run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from flows.config.sparsify import SparsifyConfig
from flows.training.fragments import held_fragments, spread_weights
from flows.training.trainable import becomes_sparse
from flows.training.weight_parts import named_parts


def is_due(config: SparsifyConfig, step: int) -> bool:
    """Whether the share of zeros rises after a step."""
    since = step - config.begin_step
    return config.sparsity > 0 and since > 0 and step <= config.end_step and since % config.interval_steps == 0


def share_of_zeros(config: SparsifyConfig, step: int) -> float:
    """Share of zeros after a step at which it rises: equation 1 of the paper, from 0."""
    progress = (step - config.begin_step) / (config.end_step - config.begin_step)
    return config.sparsity * (1 - (1 - progress) ** 3)


def has_all_zeros(config: SparsifyConfig, step: int) -> bool:
    """Whether there are as many zeros as wanted after a step."""
    return config.sparsity == 0 or step >= config.end_step


class GrowingSparsity:
    """The matrices of a model's blocks, of which more and more weights are zero.

    Args:
        model: Before the engine takes it over.
        config: How many become zero, and when.
    """

    def __init__(self, model: nn.Module, config: SparsifyConfig) -> None:
        self._config = config
        self._alive: dict[str, Tensor] = {}
        """Weights that are not zero, bool [N, K], by name; a matrix without zeros is left out."""
        self._names = [name for name, weight in model.named_parameters() if becomes_sparse(name, weight)]
        if config.sparsity:
            for name in self._names:
                model.get_parameter(name).register_hook(partial(self._without_zeros, name))

    def look(self, engine: DeepSpeedEngine) -> None:
        """Takes the weights that are zero now, in a model as it starts or goes on, for those that stay zero."""
        if self._config.sparsity:
            for name, weight in self._gathered(engine):
                self._alive[name] = weight != 0

    @torch.no_grad()
    def grow(self, engine: DeepSpeedEngine, step: int) -> None:
        """Sets weights to zero, and all that the optimizer remembers of them, where it is time to after `step`."""
        if not is_due(self._config, step):
            return
        share = share_of_zeros(self._config, step)
        for name, weight in self._gathered(engine):
            order = weight.abs().flatten().argsort(stable=True)[: round(share * weight.numel())]
            alive = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
            alive[order] = False
            self._alive[name] = alive.view_as(weight) & (weight != 0)
        weights = named_parts(engine)
        for piece in held_fragments(engine, [(name, weights[name]) for name in self._names]):
            zero = ~self._alive[piece.name].flatten()[piece.start : piece.start + piece.numel]
            for _, tensor in piece.tensors():
                if tensor.dim():
                    tensor[zero.to(tensor.device)] = 0
        spread_weights(engine)

    def _gathered(self, engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
        weights = named_parts(engine)
        for name in self._names:
            with deepspeed.zero.GatheredParameters([weights[name]]):  # a no-op below ZeRO-3
                yield name, weights[name].detach().clone()

    def _without_zeros(self, name: str, gradient: Tensor) -> Tensor:
        alive = self._alive.get(name)
        return gradient if alive is None else gradient * alive.to(gradient.device)
