"""How far a server is from its passport: nothing while it serves what was proven, above 1 once it does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from math import isnan
from pathlib import Path

import pytest

from flows.artifact import Artifact, digest_file
from flows.config import Config
from flows.config.monitoring import MonitorConfig
from flows.monitor import monitor
from flows.serving.entry import FILES
from flows.serving.proof.recorded_samples import RECORDED, scores_drift, text_drift
from flows.serving.releases.drift import RATIO, DriftWatch
from flows.serving.repository import PASSPORT
from flows.serving.server import InferenceServer
from tests.serving.releases.test_canary import change_one_weight
from tests.serving.test_monitoring import DEADLINE_S, needs_prometheus, prometheus
from tests.serving.tiny_chain import NAME

TEXT = f"{NAME}_text"


def replace_program(version: Path, name: str) -> None:
    """Another program, with a listing that vouches for it."""
    change_one_weight(version / name)
    files = json.loads((version / FILES).read_text())
    files[name] = digest_file(version / name)
    (version / FILES).write_text(json.dumps(files))


def test_a_passport_records_an_input_of_each_shorter_length(passport: Artifact) -> None:
    stated = json.loads((passport.path / "passport.json").read_text())
    recorded = stated[RECORDED]
    assert recorded["tolerance"] == stated["tolerance"]
    assert [len(sample["input_ids"]) for sample in recorded["samples"]] == [1, 2, 17, 32]
    for sample in recorded["samples"]:
        assert len(sample["token_ids"]) == len(sample["scores"]) >= 64
        assert sample["log_probability"] < 0 < recorded["text_tolerance"]


@pytest.mark.server
def test_what_was_proven_is_within_and_anything_else_is_not(server: InferenceServer, passport: Artifact) -> None:
    recorded = json.loads((passport.path / "passport.json").read_text())[RECORDED]
    address = server.http_address
    within = scores_drift(address, NAME, recorded), text_drift(address, TEXT, recorded)
    assert max(within) <= 1
    last = recorded["samples"][-1]
    for off in (2.0, float("nan")):
        last["scores"][7] += off * recorded["tolerance"]
        last["log_probability"] += 2 * off * recorded["text_tolerance"]
        for ratio in (scores_drift(address, NAME, recorded), text_drift(address, TEXT, recorded)):
            assert 1 <= ratio <= 3 if off == 2.0 else ratio == float("inf")
    last["token_ids"][-1] = 10**6  # a model with fewer tokens
    assert scores_drift(address, NAME, recorded) == float("inf")


@pytest.mark.server
def test_prometheus_is_told_of_every_server(server: InferenceServer, live_repository: Path) -> None:
    with DriftWatch(live_repository, lambda: dict.fromkeys("ab", server.http_address), "127.0.0.1", 0, 60.0) as watch:
        ratios = watch.look()
        with urllib.request.urlopen(f"http://{watch.address}/metrics") as response:
            page = response.read().decode()
    assert set(ratios) == {(model, "1", name) for model in (NAME, TEXT) for name in "ab"}
    assert max(ratios.values()) <= 1
    for (model, version, name), ratio in ratios.items():
        assert f'{RATIO}{{model="{model}",server="{name}",version="{version}"}} {ratio}' in page


@needs_prometheus
@pytest.mark.exhaustive
@pytest.mark.server
@pytest.mark.parametrize("what", ["another file", "another version"])
def test_prometheus_calls_when_what_is_served_is_not_what_was_proven(
    live_repository: Path, tmp_path: Path, what: str
) -> None:
    deadline = time.monotonic() + DEADLINE_S
    with (
        InferenceServer(live_repository, [NAME, TEXT], tmp_path / "server.log") as running,
        DriftWatch(live_repository, lambda: {"server": running.http_address}, "127.0.0.1", 0, 0.2) as watch,
    ):
        watched = MonitorConfig(targets=(watch.address,), scrape_interval_s=1, window_s=10, hold_s=0)
        monitor(Config(artifacts_dir=tmp_path, monitor=watched))
        with prometheus(tmp_path / "monitoring") as firing:
            assert max(watch.look().values()) <= 1
            version = live_repository / NAME / "1"
            if what == "another version":  # not the live one, and it answers who names none
                version = Path(shutil.copytree(version, live_repository / NAME / "2"))
            replace_program(version, "model.onnx")
            running.load(NAME)
            while "MillraceDrift" not in firing():
                assert time.monotonic() < deadline
                time.sleep(0.1)
    assert all(isnan(ratio) for ratio in watch.look().values()), "a server that has ended is no drift"


def test_a_version_without_samples_is_not_called_right(live_repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = live_repository / NAME / "1" / PASSPORT
    passport = json.loads(place.read_text())
    del passport[RECORDED]
    place.write_text(json.dumps(passport))
    with DriftWatch(live_repository, lambda: {"a": "127.0.0.1:1"}, "127.0.0.1", 0, 60.0) as watch:
        assert [isnan(ratio) for ratio in watch.look().values()] == [True, True]
        place.unlink()
        watch._told.clear()
        assert [isnan(ratio) for ratio in watch.look().values()] == [True, True]
    assert "has a passport from before they held samples: its drift is not watched. Publish it again." in caplog.text
    assert "has no passport, so that nothing proves it: its drift is not watched. Publish it again." in caplog.text


@pytest.mark.exhaustive
@pytest.mark.server
def test_servers_that_somebody_else_runs_are_asked_by_the_monitor(
    server: InferenceServer, live_repository: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "flows.monitor", f"monitor.drift_of=[{server.http_address}]", "serve.drift_port=0"]
    command += [f"publish.model_repo={live_repository}", f"artifacts_dir={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = next(line for line in process.stdout if line.startswith("Drift: "))
        url = told.removeprefix("Drift: ").partition(". ")[0]
        page, deadline = "", time.monotonic() + DEADLINE_S
        while RATIO not in page.replace(f"# HELP {RATIO}", "").replace(f"# TYPE {RATIO}", ""):
            assert time.monotonic() < deadline, page
            with urllib.request.urlopen(url) as response:
                page = response.read().decode()
        process.terminate()
    assert process.returncode == 0
    ratios = [float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(f"{RATIO}{{")]
    assert len(ratios) == 2
    assert max(ratios) <= 1
