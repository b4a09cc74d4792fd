"""Programs that show metrics: TensorBoard, a spreadsheet, Weights & Biases, MLflow; none logs an event twice.

An interrupted run is resumed from a checkpoint and measures some steps again. TensorBoard and CSV forget what came
after that checkpoint. Weights & Biases and MLflow cannot take anything back: events are counted, and since a resumed
run sees the same steps in the same order, those that were sent before are not sent again.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flows.artifact import write_json_atomically
from flows.config import ConfigError
from flows.config.tracking import TrackingConfig, WandbMode

TENSORBOARD_DIR, CSV_FILE, REMOTE_FILE = "tensorboard", "metrics.csv", "tracked.json"


class Tracker(Protocol):
    """Something that takes events."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values as of a number of optimizer updates done."""

    def close(self) -> None:
        """Writes out what is held back."""


def check_trackers(config: TrackingConfig) -> None:
    """Raises `ConfigError` where a tracker's package or credential is missing."""
    for asked, package, extra in (
        (config.wandb != WandbMode.off, "wandb", "wandb"),
        (config.mlflow, "mlflow", "mlflow"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.{package} needs the package {package}, which is not installed. "
                f"Run pip install 'millrace[{extra}]', or set tracking=tensorboard."
            )
    if config.wandb == WandbMode.online and not os.environ.get("WANDB_API_KEY"):
        raise ConfigError(
            "tracking.wandb=online needs an API key, and the environment variable WANDB_API_KEY is not set. "
            "Set it, or set tracking.wandb=offline and run `wandb sync` later."
        )


def open_trackers(
    config: TrackingConfig,
    log_dir: Path,
    run_name: str,
    events: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> list[Tracker]:
    """All trackers that the configuration names.

    Args:
        config: Which.
        log_dir: The run's logs.
        run_name: Name that stays the same when the run is resumed, and is no other run's.
        events: What was logged up to the checkpoint that the run resumes from.
        settings: The run's configuration, shown beside its metrics.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        last_step = max((event["step"] for event in events), default=0)
        trackers.append(TensorBoard(log_dir / TENSORBOARD_DIR, last_step))
    if config.csv:
        trackers.append(Csv(log_dir / CSV_FILE, events))
    if config.wandb != WandbMode.off:
        wandb = Wandb(config, run_name, settings)
        trackers.append(Once(wandb, log_dir / f"wandb-{REMOTE_FILE}", len(events)))
    if config.mlflow:
        mlflow = Mlflow(config, run_name, settings)
        trackers.append(Once(mlflow, log_dir / f"mlflow-{REMOTE_FILE}", len(events)))
    return trackers


class TensorBoard:
    """Event files; those after the step that a run resumes from are marked as void."""

    def __init__(self, directory: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports

        self._writer: Any = SummaryWriter(directory, purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Csv:
    """A row for each event; a metric that comes up later gets a column, and the rows before it an empty cell."""

    def __init__(self, path: Path, events: Sequence[Mapping[str, Any]]) -> None:
        self._path = path
        self._rows: list[Mapping[str, Any]] = list(events)
        self._columns = list(dict.fromkeys(["step", *(name for event in events for name in event)]))
        self._rewrite()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row."""
        row = {"step": step, **values}
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite()
            return
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def close(self) -> None:
        """Nothing is held back."""

    def _rewrite(self) -> None:
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)


class Once:
    """Passes each event on once, however often a run is resumed: those before the count in `path` are known already.

    The count is written before the event is sent, so that a kill between the two loses one event and doubles none.
    """

    def __init__(self, tracker: Tracker, path: Path, events_before: int) -> None:
        self._tracker, self._path = tracker, path
        self._number = events_before
        self._sent = int(path.read_text()) if path.exists() else 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values, unless that was done before."""
        self._number += 1
        if self._number > self._sent:
            self._sent = self._number
            write_json_atomically(self._path, self._sent)
            self._tracker.write(step, values)

    def close(self) -> None:
        """Closes what it passes events to."""
        self._tracker.close()


class Wandb:
    """Weights & Biases: one run there for one run here, resumed ones included."""

    def __init__(self, config: TrackingConfig, run_name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        config.directory.mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False)
        self._run = wandb.init(
            project=config.project,
            id=run_name,
            name=run_name,
            mode="online" if config.wandb == WandbMode.online else "offline",
            dir=config.directory,
            resume="allow",
            config=dict(settings),
            settings=quiet,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values; the step is one of them, because several events may share it."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Waits until everything is written or sent."""
        self._run.finish()


class Mlflow:
    """MLflow: a file store below the configuration's directory, or a server."""

    def __init__(self, config: TrackingConfig, run_name: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the store that needs no database packages
        from mlflow import MlflowClient

        store = f"file:{(config.directory / 'mlruns').absolute()}"
        self._client = MlflowClient(tracking_uri=config.mlflow_uri or store)
        experiment = self._client.get_experiment_by_name(config.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(config.project)
        same = self._client.search_runs([number], f"attributes.run_name = '{run_name}'")
        run = same[0] if same else self._client.create_run(number, run_name=run_name)
        self._run_id: str = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        if not same:
            for name, value in settings.items():
                self._client.log_param(self._run_id, name, value)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics."""
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._run_id)
