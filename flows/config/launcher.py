"""The processes that train."""

from __future__ import annotations

from dataclasses import dataclass

from flows.config.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class LauncherConfig:
    """The processes that train."""

    num_ranks: int = 1
    """Processes on this machine; with CUDA, one per GPU."""
    threads_per_rank: int = 0
    """CPU threads of each rank; 0 = the machine's cores shared out evenly."""
    stall_timeout_s: int = 600
    """Seconds without a sign of life from a rank after which the run is ended as hung."""

    def __post_init__(self) -> None:
        require_positive("launcher", self, ["num_ranks", "stall_timeout_s"])
        require(
            self.threads_per_rank >= 0,
            "launcher.threads_per_rank",
            self.threads_per_rank,
            "must not be negative",
            "Set it to 0 for an even share of the cores.",
        )
