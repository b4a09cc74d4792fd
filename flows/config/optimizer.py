"""The update rule and its constants."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flows.config.checks import require, require_fraction, require_positive


class Optimizer(StrEnum):
    """Update rules, all from torch.optim, so that no compiler is needed."""

    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"
    rmsprop = "rmsprop"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update rule and its constants."""

    name: Optimizer = Optimizer.adamw
    learning_rate: float = 3e-3
    """Peak, reached after warm-up."""
    weight_decay: float = 0.1
    """Applied to matrices only; norms are left alone."""
    beta1: float = 0.9
    """First moment of AdamW and Adam."""
    beta2: float = 0.95
    """Second moment of AdamW and Adam; smoothing constant of RMSprop."""
    eps: float = 1e-8
    momentum: float = 0.9
    """For SGD."""

    def __post_init__(self) -> None:
        require_positive("train.optimizer", self, ["learning_rate", "eps"])
        require_fraction("train.optimizer", self, ["beta1", "beta2", "momentum"])
        require(
            self.weight_decay >= 0,
            "train.optimizer.weight_decay",
            self.weight_decay,
            "must not be negative",
            "Set it to 0 to turn it off.",
        )
