"""The benchmark's logic without a GPU: what it lists, measures and counts; timed by a clock of the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import bench
from kernels.bench_report import COMPILED, KERNEL, PLAIN
from kernels.timing import FEWEST, MOST, WARM_UPS, Limits, timed
from kernels.workloads import Cost, all_workloads

CPU = torch.device("cpu")
RMS_NORM = next(each for each in all_workloads() if each.op == "rms_norm")
LIMITS = Limits(1e9, {str(torch.bfloat16): 1e12, str(torch.float32): 1e10})


class CpuStopwatch:
    """Wall-clock; memory as a call reports it."""

    def __init__(self) -> None:
        self.repetitions: list[int] = []

    def times(self, call: Callable[[], Any], prepare: Callable[[], Any], repetitions: int) -> list[float]:
        self.repetitions.append(repetitions)
        found = []
        for _ in range(repetitions):
            prepare()
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
        return found

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        call()
        return 123


class Recorded(CpuStopwatch):
    """Plays back times."""

    def __init__(self, *milliseconds: float) -> None:
        super().__init__()
        self.milliseconds = milliseconds

    def times(self, call: Callable[[], Any], prepare: Callable[[], Any], repetitions: int) -> list[float]:
        self.repetitions.append(repetitions)
        return [self.milliseconds[place % len(self.milliseconds)] for place in range(repetitions)]


def test_median_and_spread() -> None:
    timing = timed(Recorded(*range(1, 12)), lambda: None)
    assert timing.p20_ms < timing.median_ms < timing.p80_ms
    assert timed(Recorded(1.0, 1.0, 1.0, 100.0), lambda: None).median_ms == 1.0  # one outlier in four


@pytest.mark.parametrize(("milliseconds", "expected"), [(1000.0, FEWEST), (3.0, 100), (0.001, MOST), (0.0, MOST)])
def test_slow_calls_are_repeated_less_often(milliseconds: float, expected: int) -> None:
    stopwatch = Recorded(milliseconds)
    timed(stopwatch, lambda: None)
    assert stopwatch.repetitions == [WARM_UPS, expected]


def test_the_limit_is_the_longer_of_moving_and_multiplying() -> None:
    assert LIMITS.least_ms(Cost(bytes=10**9), torch.bfloat16) == 1e3
    assert LIMITS.least_ms(Cost(bytes=10**9, flops=3 * 10**12), torch.bfloat16) == 3e3
    assert LIMITS.least_ms(Cost(bytes=10**9, flops=3 * 10**12), torch.float32) == 3e5
    assert LIMITS.least_ms(Cost(bytes=10**9, flops=3 * 10**12), torch.float16) == 3e3  # as bfloat16


def test_every_pass_is_measured_by_every_implementation() -> None:
    def fails(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise torch.OutOfMemoryError("too much\nin detail")

    small = RMS_NORM.small
    workload = replace(
        RMS_NORM,
        sizes=small,
        kernel=RMS_NORM.plain,  # a kernel would need a GPU
        plain=fails,
        rivals={"rival": RMS_NORM.plain},
    )
    with torch.compiler.set_stance("force_eager"):
        measured = bench.measure_workload(workload, {"rows": 1}, CPU, CpuStopwatch(), LIMITS)
    assert [one.of for one in measured] == ["forward", "backward", "both"]
    forward, backward = RMS_NORM.forward(small).bytes, RMS_NORM.backward(small).bytes
    assert [one.least_bytes for one in measured] == [forward, backward, forward + backward]
    for one in measured:
        assert set(one.timings) == {KERNEL, "rival"}
        assert set(one.failed) == {PLAIN, COMPILED}
        assert one.failed[PLAIN] == "OutOfMemoryError: too much"
        assert one.peak_bytes == {KERNEL: 123, "rival": 123}
        assert one.least_ms == pytest.approx(1e3 * one.least_bytes / 1e9)
        assert one.share == one.least_ms / one.timings[KERNEL].median_ms
        assert one.ratio(PLAIN) is None
        assert one.ratio("rival") == one.timings["rival"].median_ms / one.timings[KERNEL].median_ms
    assert list(bench.passes(replace(workload, backward=None))) == ["forward"]


def test_a_kernel_that_fails_is_not_passed_over() -> None:
    def fails(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise RuntimeError("lost")

    broken = replace(RMS_NORM, kernel=fails, sizes=RMS_NORM.small)
    with pytest.raises(RuntimeError, match="lost"):
        bench.measure_workload(broken, {}, CPU, Recorded(1.0), LIMITS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys) -> None:
    assert bench.main([]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "Kernels are measured on a CUDA GPU; there is none here. --dry lists what would run." in said.err


def test_dry_lists_every_workload(capsys) -> None:
    assert bench.main(["--dry"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [workload.name for workload in all_workloads()]
    assert f"{RMS_NORM.name}: forward, backward, both; plain, torch.compile" in lines
    assert bench.main(["--dry", "--op", "rms_norm"]) == 0
    some = sum(workload.op == "rms_norm" for workload in all_workloads())
    assert capsys.readouterr().out.splitlines()[-1] == f"{some} workloads of 1 operations"
