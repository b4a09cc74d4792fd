"""When a version under canary is taken back."""

from __future__ import annotations

from dataclasses import dataclass

from flows.config.checks import require, require_fraction, require_positive


@dataclass(frozen=True, kw_only=True)
class CanaryConfig:
    """What a version under canary is judged by, against the live version in the same time; a breach takes it back."""

    check_interval_s: float = 5.0
    """Seconds between two judgements."""
    samples: int = 8
    """Made-up inputs whose served scores are compared with those of the version's own program, at each judgement."""
    min_requests: int = 50
    """Requests that both versions must have answered before errors and latency are judged."""
    max_error_share: float = 0.01
    """Errors of the candidate as a share of its requests may exceed those of the live version by this much."""
    max_latency_ratio: float = 2.0
    """Mean time in the server may be this many times the live version's."""

    def __post_init__(self) -> None:
        require_positive("serve.canary", self, ["check_interval_s", "samples", "min_requests"])
        require_fraction("serve.canary", self, ["max_error_share"])
        require(
            self.max_latency_ratio > 1,
            "serve.canary.max_latency_ratio",
            self.max_latency_ratio,
            "must be above 1: two equal versions differ by chance",
            "Set serve.canary.max_latency_ratio=2.",
        )
