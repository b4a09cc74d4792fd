"""Calls of each operation, one module an operation: what is compiled without a GPU and measured on one.

Every module here has a list `WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

Sizes = Mapping[str, int]
Call = Callable[..., Any]
"""Takes what `Workload.inputs` gives; returns a tensor or a tuple of tensors."""


@dataclass(frozen=True)
class Cost:
    """Least work of one pass: what a kernel that touches nothing twice would read, write and multiply."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One kind of call at one size and dtype."""

    op: str
    """The public function, e.g. "rms_norm"."""
    dtype: torch.dtype
    sizes: Sizes
    """At which it is measured, e.g. {"rows": 16384, "columns": 4096}."""
    small: Sizes
    """At which a CPU can make it, with the same launch constants: for the compile check."""
    inputs: Callable[[Sizes, torch.dtype, torch.device], dict[str, Any]]
    """Arguments by name; gradients are computed for tensors that require them."""
    kernel: Call
    """The operation, with kernels="triton"."""
    plain: Call
    """The same in plain torch, as its users would write it; its results in float64 are the truth."""
    forward: Callable[[Sizes], Cost]
    """Least work of the forward pass."""
    backward: Callable[[Sizes], Cost] | None = None
    """Least work of the backward pass; None where there is none."""
    rivals: Mapping[str, Call] = field(default_factory=dict)
    """Other implementations that are installed here, by name."""

    @property
    def name(self) -> str:
        """Tells it from the others, e.g. "rms_norm rows=16384 columns=4096 bfloat16"."""
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{self.op} {sizes} {str(self.dtype).removeprefix('torch.')}"


def all_workloads() -> list[Workload]:
    """Those of every operation, in the order of the operations' names."""
    modules = sorted(module.name for module in iter_modules(__path__))
    return [workload for name in modules for workload in import_module(f"{__name__}.{name}").WORKLOADS]
