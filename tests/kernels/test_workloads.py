"""Workloads are told apart, can be run more than once, and compute their truth in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.correctness import run
from kernels.workloads import Trial, Workload, all_workloads

FIRST = list({each.op: each for each in reversed(all_workloads())}.values())


def test_names_tell_workloads_apart() -> None:
    names = [each.name for each in all_workloads()]
    assert names
    assert len(names) == len(set(names))
    one = all_workloads()[0]
    assert replace(one, kind="odd").name == one.name.replace(one.op, f"{one.op} odd")


@pytest.mark.parametrize("workload", FIRST, ids=lambda workload: workload.name)
def test_the_truth_is_in_float64(workload: Workload) -> None:
    """What plain torch computes from float64 must not pass through float32 on the way."""
    plain, handed = run(workload, workload.plain, workload.small, torch.device("cpu"))
    truth, _ = run(workload, workload.plain, workload.small, torch.device("cpu"), handed, exact=True)
    assert len(plain) == len(truth)
    for one, exact in zip(plain, truth, strict=True):
        assert exact.dtype == torch.float64 or not one.is_floating_point()


@pytest.mark.parametrize("workload", all_workloads(), ids=lambda workload: workload.name)
def test_costs_are_counted(workload: Workload) -> None:
    assert set(workload.small) == set(workload.sizes)
    costs = [workload.forward(workload.sizes), *([workload.backward(workload.sizes)] if workload.backward else [])]
    assert sum(cost.bytes for cost in costs) > 0


def test_inputs_that_are_computed_may_be_overwritten() -> None:
    leaf = torch.arange(3.0, requires_grad=True)

    def overwrite(x: Tensor, rest: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return x.mul_(rest[0]), rest[1] * 2

    other = torch.ones(3, requires_grad=True)
    trial = Trial(overwrite, {"x": leaf * 1, "rest": (torch.full((3,), 5.0), other)})
    for _ in range(2):  # the second call does not see what the first one wrote
        trial.prepare()
        first, _ = trial.forward()
        assert torch.equal(first, 5 * torch.arange(3.0))
        dx, dother = trial.backward([torch.ones(3), torch.ones(3)])
        assert torch.equal(dx, torch.full((3,), 5.0))
        assert torch.equal(dother, torch.full((3,), 2.0))
    assert torch.equal(leaf, torch.arange(3.0))
