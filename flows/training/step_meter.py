"""What a step costs: its time, how much of that went into making batches, memory, share of the hardware's peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist


class StepMeter:
    """Measures steps between two logs, then over all of the run.

    Args:
        device: Where the rank computes.
        tokens_per_step: Tokens of a step, over all ranks.
        flops_per_token: Model FLOPs of a token, forward and back.
        peak_flops: Peak FLOP/s of all ranks together; None = not known, and the share of it is left out.
    """

    def __init__(
        self, device: torch.device, tokens_per_step: int, flops_per_token: float, peak_flops: float | None
    ) -> None:
        self._device = device
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._seconds: list[float] = []
        self._loading_s = 0.0
        self._all_seconds: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times one step; a GPU is waited for where the loss is read, so that there only sums over steps are exact."""
        started = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - started)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Times, within a step, how long the rank waits for its batches."""
        started = time.perf_counter()
        yield
        self._loading_s += time.perf_counter() - started

    def collect(self) -> dict[str, float]:
        """Measures of the steps since the last call; the worst rank's, and every rank has to call it."""
        seconds, self._seconds = self._seconds, []
        loading_s, self._loading_s = self._loading_s, 0.0
        self._all_seconds += seconds
        worst = torch.tensor(
            [sum(seconds), statistics.median(seconds), max(seconds), loading_s, peak_memory_bytes(self._device)],
            dtype=torch.float64,
            device=self._device,
        )
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        total_s, median_s, longest_s, loading_s, peak_bytes = worst.tolist()
        measures = self._speed(len(seconds), total_s)
        return measures | {
            "step_ms_p50": round(1000 * median_s, 3),
            "step_ms_max": round(1000 * longest_s, 3),
            "loader_share": round(loading_s / total_s, 5),
            "peak_memory_bytes": int(peak_bytes),
        }

    def summary(self) -> dict[str, float]:
        """Measures of this rank over all steps that `collect` has seen; without those before a resumption."""
        if not self._all_seconds:
            return {}
        total_s = sum(self._all_seconds)
        return self._speed(len(self._all_seconds), total_s) | {
            "train_s": round(total_s, 3),
            "step_ms_p50": round(1000 * statistics.median(self._all_seconds), 3),
        }

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        tokens_per_s = self._tokens_per_step * steps / seconds
        speed = {"tokens_per_s": round(tokens_per_s, 1)}
        if self._peak_flops is not None:
            speed["mfu"] = round(tokens_per_s * self._flops_per_token / self._peak_flops, 4)
        return speed


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this rank has held: allocated on its GPU, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: its number starts at that of the process that forked us.
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
