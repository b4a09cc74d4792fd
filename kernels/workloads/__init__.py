"""Calls of each operation, one module an operation: what is compiled without a GPU and measured on one.

Every module here has a list `WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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
    kind: str = ""
    """What tells it from calls of the same operation, sizes and dtype, e.g. "reverse_kl"."""
    judge: Callable[[Any, Any, Any], None] | None = None
    """Where rounding is not all that may tell results from the truth: raises AssertionError for results (first) that
    are wrong given those of `plain` in the same dtype and in float64; without it, `assert_close_to_truth` does."""

    @property
    def name(self) -> str:
        """Tells it from the others, e.g. "rms_norm rows=16384 columns=4096 bfloat16"."""
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return " ".join(filter(None, [self.op, self.kind, sizes, str(self.dtype).removeprefix("torch.")]))


class Trial:
    """Calls with the same inputs, forward and backward; operations may overwrite what they are given."""

    def __init__(self, call: Call, inputs: Mapping[str, Any]) -> None:
        """Takes over the inputs: tensors, also in tuples, of which some require gradients."""
        self._call = call
        values, self._structure = pytree.tree_flatten(dict(inputs))
        self._wanted = [isinstance(value, Tensor) and value.requires_grad for value in values]
        # gradients are those of leaves; an operation may overwrite only what is computed from one
        self._computed = [wanted and not value.is_leaf for wanted, value in zip(self._wanted, values, strict=True)]
        self._values = [
            value.detach().requires_grad_() if computed else value
            for computed, value in zip(self._computed, values, strict=True)
        ]
        self.prepare()

    def prepare(self) -> None:
        """Makes anew what an earlier call may have overwritten, except for leaves."""
        values = zip(self._computed, self._values, strict=True)
        given = [value.clone() if computed else value for computed, value in values]
        self._arguments = pytree.tree_unflatten(given, self._structure)
        self._outputs: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        """Tensors of the result, in order."""
        results = pytree.tree_leaves(self._call(**self._arguments))
        self._outputs = [result for result in results if isinstance(result, Tensor)]
        return self._outputs

    def backward(self, gradients: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Gradients of those inputs that require them, in order, after `forward`.

        Args:
            gradients: Of those results that require one, in order; without it, ones.
        """
        outputs = [output for output in self._outputs if output.requires_grad]
        gradients = [torch.ones_like(output) for output in outputs] if gradients is None else gradients
        leaves = [value for wanted, value in zip(self._wanted, self._values, strict=True) if wanted]
        return list(torch.autograd.grad(outputs, leaves, gradients))


def liger(adapted: Callable[[Any], Call], module: str = "liger_kernel.transformers.functional") -> dict[str, Call]:
    """The rival by the name of "liger", where the package Liger-Kernel is installed; it is imported when it is called.

    Args:
        adapted: From the module, a call that takes a workload's arguments.
        module: Of that package.
    """
    if find_spec("liger_kernel") is None:
        return {}
    return {"liger": lambda **inputs: adapted(import_module(module))(**inputs)}


def all_workloads() -> list[Workload]:
    """Those of every operation, in the order of the operations' names."""
    modules = sorted(module.name for module in iter_modules(__path__))
    return [workload for name in modules for workload in import_module(f"{__name__}.{name}").WORKLOADS]
