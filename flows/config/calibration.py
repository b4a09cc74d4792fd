"""Sequences of the training split on which a stage measures before it compresses."""

from __future__ import annotations

from dataclasses import dataclass, field

from flows.config.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Sequences of the training split on which is measured what matters."""

    sequences: int = 128
    """How many of `data.sequence_length` tokens; the number of GPTQ and Wanda (arXiv:2210.17323, arXiv:2306.11695)."""
    seed: int = 0
    """Of the order in which they are drawn."""

    def check(self, section: str) -> None:
        """Raises `ConfigError` unless there is something to draw; `section` is where it stands, for messages."""
        require_positive(section, self, ["sequences"])
        require(self.seed >= 0, f"{section}.seed", self.seed, "must not be negative", f"Set {section}.seed=0.")


@dataclass(frozen=True, kw_only=True)
class CalibratedConfig:
    """What a stage that measures on calibration data depends on, besides its own settings, its source and the data."""

    sequence_length: int
    """Of the calibration data, in tokens."""
    document_masks: bool = False
    """Whether documents that share a sequence are told apart."""
    mixture: dict[str, int] = field(default_factory=dict)
    """Weight of each corpus by name; empty = there is one."""

    @property
    def calibration(self) -> CalibrationConfig:
        """What is drawn."""
        raise NotImplementedError
