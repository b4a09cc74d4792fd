"""How DeepSpeed runs a model: device, precision, what ranks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from flows.config.checks import require


class Precision(StrEnum):
    """Number format of weights, activations and gradients; bf16 keeps fp32 master weights."""

    fp32 = "fp32"
    bf16 = "bf16"


class Device(StrEnum):
    """Where ranks run; `auto` takes CUDA where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    device: Device = Device.auto
    precision: Precision = Precision.fp32
    zero_stage: int = 1
    """What ranks share: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too (ZeRO, arXiv:1910.02054)."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed configuration keys, passed through; one that contradicts ours is an error."""

    def __post_init__(self) -> None:
        require(
            0 <= self.zero_stage <= 3,
            "engine.zero_stage",
            self.zero_stage,
            "must be 0, 1, 2 or 3",
            "Set engine.zero_stage=1.",
        )
        require(
            not (self.precision == Precision.bf16 and self.zero_stage == 0),
            "engine.precision",
            self.precision,
            "cannot be combined with engine.zero_stage=0: DeepSpeed 0.19 takes a phantom optimizer step there",
            "Set engine.zero_stage=1, which costs nothing on one rank.",
        )
