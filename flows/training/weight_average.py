"""An exponential moving average of the weights, kept as one more state of the optimizer.

There it is in float32, cut over ranks like the weights that ZeRO hands the optimizer, and saved and restored with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from flows.training.fragments import flat_states, spread_weights

AVERAGE = "ema"
_DECAY = "ema_decay"


def keep_average(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer average its weights after every update, by the share that `set_ema_decay` says."""
    optimizer.register_step_post_hook(_average)


@torch.no_grad()
def _average(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if AVERAGE not in state:
                state[AVERAGE] = parameter.detach().clone()
            state[AVERAGE].lerp_(parameter.detach(), 1 - group[_DECAY])


def set_ema_decay(engine: DeepSpeedEngine, decay: float) -> None:
    """Sets the share of the old average that the next optimizer update keeps."""
    for group in engine.basic_optimizer.param_groups:
        group[_DECAY] = decay


@contextmanager
def averaged_weights(engine: DeepSpeedEngine, enabled: bool) -> Iterator[None]:
    """The model computes with its average inside, where `enabled`; every bit is as before outside."""
    if not enabled:
        yield
        return
    _swap(engine)
    try:
        yield
    finally:
        _swap(engine)


@torch.no_grad()
def _swap(engine: DeepSpeedEngine) -> None:
    for parameter, state in flat_states(engine):
        if AVERAGE in state:
            held = parameter.detach().clone()
            parameter.data.copy_(state[AVERAGE])
            state[AVERAGE].copy_(held)
    spread_weights(engine)
