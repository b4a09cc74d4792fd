"""Learning rate and decay of the weight average as pure functions of the step, so that nothing has to be saved."""

from __future__ import annotations

import math

from flows.config.training import Schedule, TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the optimizer update that completes step `step` + 1.

    Linear warm-up from peak / warmup_steps to the peak, then cosine (arXiv:1608.03983), linear, constant, or stable and
    a last share of the steps in which it falls by 1 - sqrt (arXiv:2405.18392, which beats linear there), down to
    `min_learning_rate_ratio` of the peak at the last step.
    """
    peak = config.optimizer.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    last = config.max_steps - 1
    progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
    match config.schedule:
        case Schedule.constant:
            return peak
        case Schedule.linear:
            share = 1.0 - progress
        case Schedule.cosine:
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        case Schedule.wsd:
            falling = max(1, round(config.decay_share * config.max_steps))
            share = 1.0 - math.sqrt(max(0.0, 1.0 - (last - step) / falling))
    return peak * (config.min_learning_rate_ratio + (1.0 - config.min_learning_rate_ratio) * share)


def ema_decay(config: TrainConfig, step: int) -> float:
    """Share of the old average that the update which completes step `step` + 1 keeps.

    Rises from 0, where the average is the weights, as step / (step + 9), so that a short run's average is not its first
    weights (the ramp of TensorFlow's ExponentialMovingAverage).
    """
    return min(config.ema_decay, step / (step + 9))
