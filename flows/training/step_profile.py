"""A trace of chosen steps: where their time goes, operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from flows.config.tracking import TrackingConfig

TABLE_ROWS = 30


class StepProfile:
    """Traces the steps that `tracking.profile_steps` names into `log_dir`, for each rank that is traced:

    `trace-rank-<n>.json` opens in ui.perfetto.dev or chrome://tracing; `trace-rank-<n>.txt` is a table of the
    operations that took longest, with the FLOPs of matrix products.
    """

    def __init__(self, config: TrackingConfig, log_dir: Path, device: torch.device) -> None:
        rank = dist.get_rank()
        traced = bool(config.profile_steps) and (config.profile_all_ranks or rank == 0)
        self._first, self._stop = config.profile_steps if traced else (0, 0)
        self._path = log_dir / f"trace-rank-{rank}"
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Traces step `number`, counted from 0, if it is one of those."""
        if self._profile is None and self._first <= number < self._stop:
            self._profile = profile(activities=self._activities, with_flops=True)
            self._profile.start()
        yield
        if self._profile is not None and number + 1 == self._stop:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path.with_suffix(".json")))
            sort_by = "self_cuda_time_total" if len(self._activities) > 1 else "self_cpu_time_total"
            table = self._profile.key_averages().table(sort_by=sort_by, row_limit=TABLE_ROWS)
            self._path.with_suffix(".txt").write_text(table)
            self._profile = None
