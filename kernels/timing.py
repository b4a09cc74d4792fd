"""How long calls take on a GPU, how much memory they need, and the most that GPU does: all measured here and now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, Protocol

import torch

from kernels.workloads import Cost

WARM_UPS = 5
FEWEST, MOST = 10, 200
BUDGET_MS = 300.0
"""Of timed work for each call, within those bounds of repetitions."""
FLUSHED_BYTES = 512 * 1024**2
"""Ten times the L2 cache of an H200; writing it also gives the host time to launch what is timed."""
_COPIED_BYTES = 2 * 1024**3
_EDGE = 8192
"""Of the square matrices whose products are timed."""


@dataclass(frozen=True)
class Timing:
    """Of one call, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float


class Stopwatch(Protocol):
    """Measures calls on one kind of device."""

    def times(self, call: Callable[[], Any], prepare: Callable[[], Any], repetitions: int) -> list[float]:
        """Milliseconds of each call; each is prepared first, which does not count."""

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Most memory allocated during the call, beyond what was allocated before."""


def timed(stopwatch: Stopwatch, call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> Timing:
    """Median and spread, from as many repetitions as `BUDGET_MS` allows after `WARM_UPS`."""
    estimate = min(stopwatch.times(call, prepare, WARM_UPS))
    repetitions = int(min(max(BUDGET_MS / max(estimate, 1e-6), FEWEST), MOST))
    tenths = quantiles(stopwatch.times(call, prepare, repetitions), n=10, method="inclusive")
    return Timing(median_ms=tenths[4], p20_ms=tenths[1], p80_ms=tenths[7])


class CudaStopwatch:
    """By CUDA events, each call with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def times(self, call: Callable[[], Any], prepare: Callable[[], Any], repetitions: int) -> list[float]:
        """Milliseconds of each call; each is prepared first, which does not count."""
        pairs = []
        for _ in range(repetitions):
            prepare()
            self._flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Most memory allocated during the call, beyond what was allocated before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Limits:
    """The most that a GPU was seen to do."""

    bytes_per_second: float
    """Read and written by a copy."""
    flops_per_second: dict[str, float]
    """Of the library's matrix product, by dtype."""

    def least_ms(self, cost: Cost, dtype: torch.dtype) -> float:
        """Time in which no kernel can be done: the longer of moving the bytes and of multiplying."""
        rate = self.flops_per_second.get(str(dtype), self.flops_per_second[str(torch.bfloat16)])
        return 1e3 * max(cost.bytes / self.bytes_per_second, cost.flops / rate)


def measure_limits(stopwatch: Stopwatch, device: torch.device) -> Limits:
    """Copies 2 GiB and multiplies square matrices of every dtype that this GPU multiplies."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.int8, device=device)
    copy = timed(stopwatch, source.clone)
    del source
    products: dict[torch.dtype, Callable[[torch.Tensor], Any]] = {
        torch.float32: lambda a: a @ a,
        torch.float16: lambda a: a @ a,
        torch.bfloat16: lambda a: a @ a,
        torch.int8: lambda a: torch._int_mm(a, a.t()),
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        products[torch.float8_e4m3fn] = lambda a: torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16)
    rates = {}
    for dtype, product in products.items():
        a = torch.randn(_EDGE, _EDGE, device=device).mul_(8).to(dtype)
        rates[str(dtype)] = 2 * _EDGE**3 / (1e-3 * timed(stopwatch, lambda: product(a)).median_ms)  # noqa: B023
    return Limits(2 * _COPIED_BYTES / (1e-3 * copy.median_ms), rates)
