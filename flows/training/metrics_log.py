"""What a run measures as it goes: metrics.jsonl for programs, trackers for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.config.tracking import TrackingConfig
from flows.training.trackers import open_trackers

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends one line per event to metrics.jsonl, and hands it to the trackers; rank 0 only.

    Args:
        log_dir: Where it is written.
        step: Step that the run resumes from: later lines, from a run that was interrupted, are dropped.
        config: Which trackers there are.
        run_name: What the run is called there.
        settings: The run's configuration, for trackers that show it.
    """

    def __init__(
        self, log_dir: Path, step: int, config: TrackingConfig, run_name: str, settings: Mapping[str, Any]
    ) -> None:
        path = log_dir / METRICS
        kept = [event for event in read_metrics(path) if event["step"] <= step]
        path.write_text("".join(json.dumps(event) + "\n" for event in kept))
        self._file = path.open("a", buffering=1)
        self._trackers = open_trackers(config, log_dir, run_name, kept, settings)

    def write(self, step: int, **values: float) -> None:
        """Logs values as of a number of optimizer updates done."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self) -> None:
        """Closes the file and the trackers, which write out what they hold back."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a metrics.jsonl; a last line that was cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
