"""Hardware that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flows.config.checks import require


class HardwareName(StrEnum):
    """Hardware to plan for; `auto` is what this machine has."""

    auto = "auto"
    cpu = "cpu"
    h200 = "h200"
    h100 = "h100"
    a100 = "a100"
    l4 = "l4"
    rtx4090 = "rtx4090"


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan assumes; no run depends on it."""

    hardware: HardwareName = HardwareName.auto
    """`auto`: this machine's GPUs, else its processor; or a name, to plan for hardware that is not here."""
    mfu: float | None = None
    """Share of the peak FLOP/s that training is assumed to reach; null = a typical one for the hardware."""
    price_per_device_hour: float | None = None
    """What one device (a GPU, or the whole machine without one) costs an hour, in your currency; null = no costs."""

    def __post_init__(self) -> None:
        require(
            self.mfu is None or 0 < self.mfu <= 1,
            "plan.mfu",
            self.mfu,
            "must lie above 0 and up to 1: it is a share of the peak",
            "Set plan.mfu=0.4, or null for what is typical.",
        )
        require(
            self.price_per_device_hour is None or self.price_per_device_hour >= 0,
            "plan.price_per_device_hour",
            self.price_per_device_hour,
            "must not be negative",
            "Set it to null to leave costs out.",
        )
