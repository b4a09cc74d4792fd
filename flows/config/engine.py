"""How DeepSpeed runs a model: device, precision, what ranks share, what is kept elsewhere than in their memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from typing import Any

from flows.config.checks import require, require_positive


class Precision(StrEnum):
    """Number format of weights, activations and gradients; bf16 and fp8 keep fp32 master weights.

    fp8 is bf16 but for the matrix products of all blocks, whose operands are rounded to fp8 (arXiv:2209.05433).
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


class Device(StrEnum):
    """Where ranks run; `auto` takes CUDA where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Offload(StrEnum):
    """Where something is kept while it is not computed with."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    device: Device = Device.auto
    precision: Precision = Precision.fp32
    zero_stage: int = 1
    """What data-parallel ranks share: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too (ZeRO,
    arXiv:1910.02054)."""
    offload_optimizer: Offload = Offload.none
    """Where optimizer state is kept and the update computed (ZeRO-Offload, arXiv:2101.06840)."""
    offload_parameters: Offload = Offload.none
    """Where ZeRO-3's weights wait until a layer needs them (ZeRO-Infinity, arXiv:2104.07857); not `nvme`."""
    nvme_path: Path | None = None
    """Directory on a fast disk of each machine, for optimizer state that is offloaded to `nvme`, masters included."""
    pipeline_stages: int = 1
    """Ranks that each hold a part of the layers; micro batches flow through them (arXiv:1811.06965)."""
    tensor_parallel_size: int = 1
    """Ranks that share every layer's matrices (arXiv:1909.08053); best within one machine."""
    sequence_parallel_size: int = 1
    """Ranks that share every sequence's tokens and trade heads in attention (Ulysses, arXiv:2309.14509)."""
    expert_parallel_size: int = 1
    """Data-parallel ranks that share the experts of a mixture (arXiv:2006.16668)."""
    activation_checkpointing: bool = False
    """Keeps each layer's input only and computes the rest again on the way back (arXiv:1604.06174)."""
    compile: bool = False
    """Compiles the model with torch.compile: tens of seconds at the start, faster steps after."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed configuration keys, passed through; one that contradicts ours is an error."""

    def __post_init__(self) -> None:
        require_positive("engine", self, PARALLELISM)
        require(
            0 <= self.zero_stage <= 3,
            "engine.zero_stage",
            self.zero_stage,
            "must be 0, 1, 2 or 3",
            "Set engine.zero_stage=1.",
        )
        require(
            self.precision == Precision.fp32 or self.zero_stage > 0,
            "engine.precision",
            self.precision,
            "cannot be combined with engine.zero_stage=0: DeepSpeed 0.19 takes a phantom optimizer step there",
            "Set engine.zero_stage=1, which costs nothing on one rank.",
        )
        for name, without in {"tensor_parallel_size": 1, "compile": False}.items():
            value = getattr(self, name)
            require(
                self.precision != Precision.fp8 or value == without,
                "engine.precision",
                self.precision,
                f"cannot be combined with engine.{name}={value}: the two have not been shown right together",
                f"Set engine.precision=bf16, or engine.{name}={without}.",
            )
        self._check_offload()
        self._check_pairs()

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that work on the same sequences: one data-parallel rank."""
        return self.pipeline_stages * self.tensor_parallel_size * self.sequence_parallel_size

    def _check_offload(self) -> None:
        require(
            self.offload_optimizer == Offload.none or self.zero_stage >= 1,
            "engine.offload_optimizer",
            self.offload_optimizer,
            f"cannot be combined with engine.zero_stage={self.zero_stage}: it needs ZeRO 1, 2 or 3",
            "Set engine.zero_stage=1.",
        )
        require(
            self.offload_optimizer != Offload.nvme or self.zero_stage == 3,
            "engine.offload_optimizer",
            self.offload_optimizer,
            f"cannot be combined with engine.zero_stage={self.zero_stage}: below ZeRO-3 DeepSpeed keeps it in memory",
            "Set engine.zero_stage=3, or engine.offload_optimizer=cpu.",
        )
        require(
            self.offload_parameters == Offload.none or self.zero_stage == 3,
            "engine.offload_parameters",
            self.offload_parameters,
            f"cannot be combined with engine.zero_stage={self.zero_stage}: only ZeRO-3 fetches weights layer by layer",
            "Set engine.zero_stage=3.",
        )
        require(
            self.offload_parameters != Offload.nvme,
            "engine.offload_parameters",
            self.offload_parameters,
            "is not supported: DeepSpeed 0.19 gives a weight that it reads ahead a second buffer, and ends",
            "Set engine.offload_parameters=cpu; engine.offload_optimizer=nvme keeps the larger part on the disk.",
        )
        to_nvme = self.offload_optimizer == Offload.nvme
        require(
            (self.nvme_path is not None) == to_nvme,
            "engine.nvme_path",
            self.nvme_path,
            "must be given exactly if optimizer state is offloaded to nvme",
            "Set engine.nvme_path=/a/fast/disk." if to_nvme else "Set engine.nvme_path=null.",
        )

    def _check_pairs(self) -> None:
        require(
            self.pipeline_stages == 1 or self.zero_stage <= 1,
            "engine.zero_stage",
            self.zero_stage,
            f"cannot be combined with engine.pipeline_stages={self.pipeline_stages}: pipeline parallelism shards "
            "layers and supports ZeRO 0-1",
            "Set engine.zero_stage=1, or engine.pipeline_stages=1.",
        )
        used = [name for name in PARALLELISM if getattr(self, name) > 1]
        for first, second in combinations(used, 2):
            require(
                {first, second} in SUPPORTED_PAIRS,
                f"engine.{first}",
                getattr(self, first),
                f"cannot be combined with engine.{second}={getattr(self, second)}: "
                + WHY_NOT.get(frozenset({first, second}), "nobody has shown the two right together"),
                f"Set engine.{first}=1 or engine.{second}=1; either goes together with data parallelism and ZeRO.",
            )


PARALLELISM = ("pipeline_stages", "tensor_parallel_size", "sequence_parallel_size", "expert_parallel_size")
"""Ways to share a model among ranks, besides data parallelism."""
SUPPORTED_PAIRS = [
    {"pipeline_stages", "sequence_parallel_size"},
    {"tensor_parallel_size", "sequence_parallel_size"},
]
"""Kinds of parallelism, besides data parallelism, that give the single-process loss curve together."""
WHY_NOT = {
    frozenset({"pipeline_stages", "tensor_parallel_size"}): "DeepSpeed 0.19's pipeline stages wait for collectives "
    "that its tensor-parallel layers have in another order",
}
