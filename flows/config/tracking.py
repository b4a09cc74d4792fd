"""Where training metrics go, and which steps are profiled."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from flows.config.checks import require


class WandbMode(StrEnum):
    """Whether Weights & Biases is written, and whether it is sent."""

    off = "off"
    offline = "offline"
    online = "online"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where training metrics go besides metrics.jsonl; credentials come from the trackers' environment variables."""

    tensorboard: bool = True
    """Writes TensorBoard event files beside metrics.jsonl."""
    csv: bool = False
    """Writes metrics.csv beside metrics.jsonl: a row for each event, a column for each metric."""
    wandb: WandbMode = WandbMode.off
    """Weights & Biases: `offline` keeps files for `wandb sync`, `online` sends them (WANDB_API_KEY). Extra: wandb."""
    mlflow: bool = False
    """MLflow: a local file store, or the server of `mlflow_uri`. Extra: mlflow."""
    mlflow_uri: str | None = None
    """MLflow server (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN); null = local."""
    project: str = "millrace"
    """Project in Weights & Biases, experiment in MLflow."""
    directory: Path = Path("artifacts/tracking")
    """Local files of Weights & Biases and MLflow: outside artifacts, because their tools write to them afterwards."""
    profile_steps: tuple[int, ...] = ()
    """[start, stop]: steps start to stop - 1, counted from 0, are traced with torch.profiler into logs/; [] = none."""
    profile_all_ranks: bool = False
    """Traces every rank, not the first alone."""

    def __post_init__(self) -> None:
        steps = self.profile_steps
        require(
            not steps or (len(steps) == 2 and 0 <= steps[0] < steps[1]),
            "tracking.profile_steps",
            list(steps),
            "must be [] or [start, stop] with 0 <= start < stop",
            "Set tracking.profile_steps=[10,12].",
        )
        require(
            self.mlflow_uri is None or self.mlflow,
            "tracking.mlflow_uri",
            self.mlflow_uri,
            "is given while tracking.mlflow=false",
            "Set tracking.mlflow=true.",
        )
        require(
            self.mlflow_uri is None or urlsplit(self.mlflow_uri).username is None,
            "tracking.mlflow_uri",
            "(hidden)",
            "must not hold a user name or password: the configuration is kept with the run",
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment.",
        )
        require(
            bool(self.project.strip()),
            "tracking.project",
            repr(self.project),
            "must not be empty",
            "Set tracking.project=millrace.",
        )
