"""Each tracker's own reader finds every event once, also after a run was interrupted and measured some steps again."""

from __future__ import annotations

import csv
import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from flows.compose import compose_config
from flows.config import ConfigError
from flows.config.tracking import TrackingConfig, WandbMode
from flows.training import trackers
from flows.training.metrics_log import MetricsLog, read_metrics
from flows.training.trackers import check_trackers

EVERYWHERE: dict[str, Any] = {"tensorboard": True, "csv": True, "wandb": WandbMode.offline, "mlflow": True}
INTERRUPTED_AT, RESUMED_FROM, LAST = 5, 3, 8


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Logs of a run that was interrupted after step 5 and resumed from step 3; nothing may go over a network."""

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"connects to {address}")
        connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)
    config = TrackingConfig(directory=tmp_path / "tracking", **EVERYWHERE)
    logs = tmp_path / "logs"
    logs.mkdir()
    for resumed_from, last in ((0, INTERRUPTED_AT), (RESUMED_FROM, LAST)):
        log = MetricsLog(logs, resumed_from, config, "base-0123", {"train.max_steps": LAST})
        for step in range(resumed_from + 1, last + 1):
            log.write(step, train_loss=1 / step)
            if step == 4:
                log.write(step, validation_loss=0.5)
        log.close()
    return tmp_path


def test_no_event_is_doubled_anywhere(logged: Path) -> None:
    steps = list(range(1, LAST + 1))
    events = list(read_metrics(logged / "logs" / "metrics.jsonl"))
    assert [event["step"] for event in events if "train_loss" in event] == steps

    board = EventAccumulator(str(logged / "logs" / "tensorboard")).Reload()
    assert [(one.step, pytest.approx(one.value)) for one in board.Scalars("train_loss")] == [
        (step, 1 / step) for step in steps
    ]
    assert [one.step for one in board.Scalars("validation_loss")] == [4]

    with (logged / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == steps
    assert [row["step"] for row in rows if row["validation_loss"]] == ["4"]

    client = MlflowClient(tracking_uri=f"file:{logged / 'tracking' / 'mlruns'}")
    experiment = client.get_experiment_by_name("millrace")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.max_steps": str(LAST)}
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(one.step, one.value) for one in history] == [(step, 1 / step) for step in steps]

    logs = sorted((logged / "tracking" / "wandb").glob("offline-run-*/run-base-0123.wandb"))
    sent = [row for path in logs for row in _wandb_history(path)]
    assert sorted(row["step"] for row in sent if "train_loss" in row) == steps
    assert [row["step"] for row in sent if "validation_loss" in row] == [4]


def _wandb_history(path: Path) -> list[dict[str, Any]]:
    """Rows in W&B's file: a header of 7 bytes, then records (LevelDB's log: checksum, length, type, bytes)."""
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    assert len(data) < 32_768, "one block: no record is split"
    rows, place = [], 7
    while place < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1, "a whole record"
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[place + 7 : place + 7 + length])
        place += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_a_missing_package_is_named_with_its_extra_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for choice in ("wandb", "mlflow"):
        tracking = compose_config([f"tracking={choice}"]).tracking
        with pytest.raises(ConfigError, match=rf"tracking.{choice} needs .* pip install 'millrace\[{choice}\]'"):
            check_trackers(tracking)
    check_trackers(compose_config(["tracking=csv"]).tracking)


def test_credentials_come_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online = TrackingConfig(wandb=WandbMode.online)
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set"):
        check_trackers(online)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    check_trackers(online)
    with pytest.raises(ConfigError, match="must not hold a user name or password") as refused:
        TrackingConfig(mlflow=True, mlflow_uri="https://me:secret@mlflow.example.org")
    assert "secret" not in str(refused.value)
