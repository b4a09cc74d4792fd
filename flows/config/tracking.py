"""Where training metrics go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where training metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Writes TensorBoard event files beside metrics.jsonl."""
