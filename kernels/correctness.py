"""Whether a workload's kernel gives what plain torch gives in float64: a benchmark asks before it times anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kernels.testing import assert_close_to_truth
from kernels.workloads import Call, Sizes, Trial, Workload


@dataclass(frozen=True)
class Verdict:
    """What was found of one workload."""

    sizes: Sizes
    """At which it was run: its own, or what fits into memory."""
    error: str | None
    """What is wrong, if anything."""


def verdict(workload: Workload, device: torch.device, sizes: Sizes | None = None) -> Verdict:
    """Compares results and gradients of the kernel with those of plain torch in float64, from the same inputs.

    Args:
        workload: What to run.
        device: Where.
        sizes: At which; without it, at the workload's own or the largest that fit.
    """
    for attempt in shrinking(workload) if sizes is None else [sizes]:
        try:
            verify(workload, workload.kernel, attempt, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        except Exception as error:  # a kernel that cannot be launched is as wrong as one that errs
            return Verdict(attempt, f"{type(error).__name__}: {error}")
        return Verdict(attempt, None)
    return Verdict(workload.small, "not even the small sizes fit into memory")


def verify(workload: Workload, call: Call, sizes: Sizes, device: torch.device) -> None:
    """Fails if a call (the kernel or a rival) errs more than `kernels.testing.assert_close_to_truth` allows.

    Raises:
        AssertionError: Which result, and by how much.
    """
    actual, gradients = run(workload, call, sizes, device)
    plain, _ = run(workload, workload.plain, sizes, device, gradients)
    truth, _ = run(workload, workload.plain, sizes, device, gradients, exact=True)
    if workload.judge is not None:
        workload.judge(actual, plain, truth)
        return
    assert len(actual) == len(plain), f"{len(actual)} results instead of {len(plain)}"
    for place, (one, achieved, exact) in enumerate(zip(actual, plain, truth, strict=True)):
        try:
            _compare(one, achieved, exact)
        except AssertionError as error:
            raise AssertionError(f"result {place} (gradients come last): {error}") from None


def run(
    workload: Workload,
    call: Call,
    sizes: Sizes,
    device: torch.device,
    gradients: Sequence[Tensor] | None = None,
    exact: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Results, then gradients of the inputs; and the gradients of the results that were handed back.

    Args:
        workload: Makes the inputs, the same ones every time.
        call: The kernel, or what it is compared with.
        sizes: Of the inputs.
        device: Of the inputs.
        gradients: Those to hand back; random ones without it.
        exact: Compute in float64.
    """
    torch.manual_seed(0)
    inputs = workload.inputs(sizes, workload.dtype, device)
    trial = Trial(call, _widened(inputs) if exact else inputs)
    outputs = trial.forward()
    results = [output.detach().clone() for output in outputs]  # a backward pass may overwrite them
    if workload.backward is None:
        return results, []
    differentiable = [output for output in outputs if output.requires_grad]
    if gradients is None:
        gradients = [torch.randn_like(output) for output in differentiable]
    handed = [gradient.to(output.dtype) for gradient, output in zip(gradients, differentiable, strict=True)]
    kept = [gradient.clone() for gradient in handed]
    return results + trial.backward(handed), kept


def shrinking(workload: Workload) -> Iterator[Sizes]:
    """The workload's sizes, then halves of them, down to its small ones."""
    sizes = dict(workload.sizes)
    while True:
        yield sizes
        smaller = {name: max(size // 2, min(size, workload.small[name])) for name, size in sizes.items()}
        if smaller == sizes:
            return
        sizes = smaller


def _widened(inputs: Mapping[str, Any]) -> dict[str, Any]:
    def widened(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: pytree.tree_map(widened, value) for name, value in inputs.items()}


def _compare(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    if not actual.is_floating_point():
        assert actual.shape == truth.shape, f"shape {list(actual.shape)} instead of {list(truth.shape)}"
        wrong = (actual != truth) & (actual != plain)  # a choice that rounding decides may be made either way
        assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} elements are not what plain torch gives"
        return
    assert truth.dtype == torch.float64, f"plain torch computes in {truth.dtype} where it is given float64: no truth"
    # errors are of the scale of the tensor, not of the element: terms cancel, and how is known to each operation only
    assert_close_to_truth(actual, plain, truth, truth.abs().max() if truth.numel() else None)
