"""Learning rate as a pure function of the step, so that nothing has to be saved to resume it."""

from __future__ import annotations

import math

from flows.config.training import Schedule, TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the optimizer update that completes step `step` + 1.

    Linear warm-up from peak / warmup_steps to the peak, then cosine (arXiv:1608.03983), linear or constant, down to
    `min_learning_rate_ratio` of the peak at the last step.
    """
    peak = config.optimizer.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - 1 - config.warmup_steps)
    match config.schedule:
        case Schedule.constant:
            return peak
        case Schedule.linear:
            share = 1.0 - progress
        case Schedule.cosine:
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (config.min_learning_rate_ratio + (1.0 - config.min_learning_rate_ratio) * share)
