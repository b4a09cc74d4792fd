"""Low-rank adapters: what is trained instead of the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass

from flows.config.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside frozen matrices (LoRA, arXiv:2106.09685), merged into them at the end."""

    rank: int = 0
    """Width of each adapter; 0 = no adapters, the weights themselves are trained. 8 or 16 is usual."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank, so that another rank needs no other learning rate."""
    dropout: float = 0.0
    """Share of an adapter's inputs set to zero in training."""
    targets: tuple[str, ...] = ("*_proj",)
    """Glob patterns of linear modules that get an adapter. All of attention and feed-forward, which full fine-tuning's
    quality needs (QLoRA, arXiv:2305.14314)."""
    replaced: tuple[str, ...] = ()
    """Glob patterns of modules whose own weights are trained in full beside the adapters, e.g. `lm_head` (PEFT's
    modules_to_save)."""

    @property
    def enabled(self) -> bool:
        """Whether there are adapters."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """Factor of what an adapter adds."""
        return self.alpha / self.rank

    def __post_init__(self) -> None:
        require(self.rank >= 0, "train.lora.rank", self.rank, "must not be negative", "Set it to 0 for no adapters.")
        require_positive("train.lora", self, ["alpha"])
        require(
            0 <= self.dropout < 1,
            "train.lora.dropout",
            self.dropout,
            "must be 0 or more and below 1",
            "Set train.lora.dropout=0.05.",
        )
        require(
            self.rank == 0 or bool(self.targets),
            "train.lora.targets",
            list(self.targets),
            f"names no module for the adapters of train.lora.rank={self.rank}",
            "Set train.lora.targets=[*_proj].",
        )
