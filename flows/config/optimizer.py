"""The update rule and its constants; conf/train/optimizer has a file of constants for each rule, with their source."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flows.config.checks import require, require_fraction, require_positive


class Optimizer(StrEnum):
    """Update rules in plain torch, so that no compiler is needed on CPU or GPU."""

    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"
    rmsprop = "rmsprop"
    lion = "lion"
    muon = "muon"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update rule and its constants; choose both at once: `train/optimizer=lion`."""

    name: Optimizer = Optimizer.adamw
    """The rule alone; its constants stay as they are, unlike with `train/optimizer=lion`."""
    learning_rate: float = 3e-3
    """Peak, reached after warm-up."""
    weight_decay: float = 0.1
    """Applied to matrices only: norms and biases are left alone. Decoupled for AdamW (arXiv:1711.05101), Lion and Muon,
    part of the gradient for the others."""
    decay_embeddings: bool = True
    """Embeddings decay like other matrices, as in GPT-2's and Llama's recipes; OLMo 2 leaves them alone
    (arXiv:2501.00656), which is said to keep their norms healthy."""
    beta1: float = 0.9
    """First moment of AdamW and Adam, also of the AdamW beside Muon; share of the momentum in Lion's update."""
    beta2: float = 0.95
    """Second moment of AdamW and Adam, also of the AdamW beside Muon; smoothing constant of RMSprop; Lion's
    momentum."""
    eps: float = 1e-8
    """Added to the root of the second moment that an update is divided by."""
    momentum: float = 0.9
    """Of SGD, RMSprop and Muon."""

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
