"""What a run measures as it goes: metrics.jsonl for programs, TensorBoard for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends one line per event to metrics.jsonl, and scalars to TensorBoard; rank 0 only.

    Args:
        log_dir: Where both are written.
        step: Step that the run resumes from: later lines, from a run that was interrupted, are dropped.
        tensorboard: Whether to write event files.
    """

    def __init__(self, log_dir: Path, step: int, tensorboard: bool) -> None:
        path = log_dir / METRICS
        kept = [event for event in read_metrics(path) if event["step"] <= step]
        path.write_text("".join(json.dumps(event) + "\n" for event in kept))
        self._file = path.open("a", buffering=1)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports

            self._writer = SummaryWriter(log_dir / "tensorboard", purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """Logs values as of a number of optimizer updates done."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a metrics.jsonl; a last line that was cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
