"""Zeros that grow while a model is trained."""

from __future__ import annotations

from dataclasses import dataclass

from flows.config.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """The smallest weights of each matrix of the blocks become zero while the others go on learning; their share rises
    fast at first and ever slower, s = sparsity (1 - (1 - t)^3) with t from 0 to 1 (arXiv:1710.01878). Zeros stay zeros.
    """

    sparsity: float = 0.0
    """Share of zeros in the end; 0 = none."""
    begin_step: int = 0
    """After this step the first weights become zero."""
    end_step: int = 200
    """After this step there are as many zeros as wanted; what is left of the training makes up for them."""
    interval_steps: int = 10
    """Steps from one rise to the next."""

    def __post_init__(self) -> None:
        require(
            0 <= self.sparsity < 1,
            "train.sparsify.sparsity",
            self.sparsity,
            "must be 0 or more and below 1, where nothing is left",
            "Set train.sparsify.sparsity=0.5.",
        )
        require_positive("train.sparsify", self, ["interval_steps"])
        length = self.end_step - self.begin_step
        require(
            self.begin_step >= 0 and length > 0 and length % self.interval_steps == 0,
            "train.sparsify.end_step",
            self.end_step,
            f"must lie a multiple of train.sparsify.interval_steps={self.interval_steps} steps after "
            f"train.sparsify.begin_step={self.begin_step}, which is 0 or more",
            f"Set train.sparsify.end_step={max(0, self.begin_step) + 10 * self.interval_steps}.",
        )
