"""A wrong kernel is told before anything is timed; collected under TRITON_INTERPRET=1 only."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.bench import measure
from kernels.correctness import Verdict, shrinking, verdict
from kernels.dispatch import DTYPES
from kernels.testing import strict_memory
from kernels.timing import Limits
from kernels.workloads import Workload, all_workloads

CPU = torch.device("cpu")
SIZES = {"rows": 5, "columns": 40}
RIGHT = next(each for each in all_workloads() if each.op == "rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return RIGHT.kernel(x=x, weight=weight, eps=eps)


def in_float32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps)


def wrong_result(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight, 100 * eps)


def wrong_gradient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight, eps) + (x - x.detach()) / 1000


def unfinished(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = rms_norm(x, weight, eps)
    return torch.where(torch.arange(len(y))[:, None] == 3, torch.nan, y)


def broken(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    raise ValueError("lost")


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    assert verdict(replace(RIGHT, dtype=dtype), CPU, SIZES) == Verdict(SIZES, None)


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (wrong_result, "AssertionError: result 0 .*: error .* is allowed"),
        (wrong_gradient, "AssertionError: result 1 .*: error .* is allowed"),
        (unfinished, "AssertionError: result 0 .*: 40 of 200 elements are not finite"),
        (broken, "ValueError: lost"),
    ],
)
def test_wrong_kernels_get_no_numbers(kernel: Callable[..., Tensor], complaint: str) -> None:
    planted = replace(RIGHT, dtype=torch.float32, kernel=kernel, sizes=SIZES, small=SIZES)
    limits = Limits(1e12, {str(torch.bfloat16): 1e15})
    report = measure([planted], CPU, None, limits, {})  # no stopwatch: nothing may be timed
    assert report.measurements == []
    (error,) = report.refused.values()
    assert re.match(complaint, error), error


def test_choices_are_those_of_plain_torch_or_of_the_truth() -> None:
    def largest(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x.half().argmax(1) if x.dtype == torch.float32 else x.argmax(1)

    def second(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x.topk(2, dim=1).indices[:, 1]

    choosing = replace(RIGHT, backward=None, plain=largest, kernel=torch.no_grad()(lambda x, **_: x.argmax(1)))
    assert verdict(choosing, CPU, SIZES).error is None
    error = verdict(replace(choosing, kernel=second), CPU, SIZES).error
    assert error == "AssertionError: result 0 (gradients come last): 5 of 5 elements are not what plain torch gives"


def test_a_truth_that_is_not_in_float64_is_none() -> None:
    error = verdict(replace(RIGHT, plain=in_float32), CPU, SIZES).error
    assert error is not None
    assert "plain torch computes in torch.float32 where it is given float64: no truth" in error


def test_a_judge_replaces_the_comparison() -> None:
    def lenient(actual: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
        for one, exact in zip(actual, truth, strict=True):
            assert (one - exact).abs().max() < 0.1, "far off"

    planted = replace(RIGHT, kernel=wrong_result, judge=lenient)
    assert verdict(planted, CPU, SIZES).error is None
    assert verdict(replace(planted, kernel=unfinished), CPU, SIZES).error is not None


def test_what_does_not_fit_is_checked_at_half_the_size() -> None:
    def limited(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if len(x) > 10:
            raise torch.OutOfMemoryError("too much")
        return rms_norm(x, weight, eps)

    large = replace(RIGHT, kernel=limited, sizes={"rows": 24, "columns": 40}, small={"rows": 4, "columns": 40})
    assert list(shrinking(large)) == [{"rows": rows, "columns": 40} for rows in (24, 12, 6, 4)]
    assert verdict(large, CPU) == Verdict({"rows": 6, "columns": 40}, None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("workload", all_workloads(), ids=lambda workload: workload.name)
def test_every_workload_is_right_at_its_small_sizes(workload: Workload) -> None:
    with strict_memory():
        assert verdict(workload, CPU, workload.small).error is None
