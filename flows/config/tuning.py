"""What settings of a served model are tried for, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flows.config.checks import require, require_positive


class TuneTask(StrEnum):
    """Which of a version's two models is tuned."""

    text = "text"
    scores = "scores"


class TuneLatency(StrEnum):
    """Which wait the target is for."""

    first_token = "first_token"
    """Until a text begins."""
    between_tokens = "between_tokens"
    """Between two pieces of a text."""
    whole = "whole"
    """Until the answer is complete."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What `python -m flows.tune` looks for: most answers per second among the settings that keep a waiting time."""

    task: TuneTask = TuneTask.text
    latency: TuneLatency = TuneLatency.first_token
    target_p95_ms: float = 500.0
    """95 % of those waits must be no longer."""
    clients: int = 16
    """Clients, each of which asks again as soon as it is answered."""
    prompt_tokens: int = 64
    """Length of a request; prompts are cut from the test split."""
    new_tokens: int = 64
    """Tokens asked for by a request for text."""
    trial_s: float = 8.0
    """Seconds for which each setting is measured, after a quarter of that for warm-up."""
    minutes: float = 10.0
    """No trial begins after this; the same command goes on where it stopped."""

    def __post_init__(self) -> None:
        require_positive(
            "tune", self, ["target_p95_ms", "clients", "prompt_tokens", "new_tokens", "trial_s", "minutes"]
        )
        require(
            self.task == TuneTask.text or self.latency == TuneLatency.whole,
            "tune.latency",
            self.latency,
            f"means nothing for tune.task={self.task}, whose answers come in one piece",
            "Set tune.latency=whole.",
        )
