"""Alerts and dashboards: on the numbers of a real server, judged by a real Prometheus where one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tritonclient.utils
from ruamel.yaml import YAML

from flows.config import Config
from flows.config.monitoring import MonitorConfig
from flows.launcher import stop_sessions
from flows.launcher.sessions import free_port
from flows.monitor import monitor
from flows.serving.client import Client, Transport
from flows.serving.monitoring import alert_rules, dashboard
from flows.serving.releases.drift import RATIO
from flows.serving.server import InferenceServer
from tests.serving.tiny_chain import NAME, Chain

TEXT = f"{NAME}_text"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus"
)
DEADLINE_S = 60
OUTCOMES = ("length", "failed", "refused")


def expressions() -> list[str]:
    config = MonitorConfig()
    rules = [rule["expr"] for rule in alert_rules(config)["groups"][0]["rules"]]
    return rules + [panel["targets"][0]["expr"] for panel in dashboard(config)["panels"]]


def metrics_of(server: InferenceServer) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as response:
        page: str = response.read().decode()
    return page


@pytest.mark.server
def test_every_number_that_is_watched_is_one_that_the_server_gives(server: InferenceServer) -> None:
    with Client(Transport.grpc, server.grpc_address) as client:
        client.generate(TEXT, "def f(", options={"max_tokens": 3})
    named = {name for one in expressions() for name in re.findall(r"(?:millrace|nv)_\w+", one)}
    given = set(re.findall(r"^(\w+)[{ ]", metrics_of(server), re.MULTILINE))
    assert len(named) > 8
    assert named - {RATIO} <= given, "the rest is told by flows.serve"


@pytest.mark.server
def test_outcomes_are_counted_that_the_server_takes_for_successes(server: InferenceServer) -> None:
    def count(outcome: str) -> int:
        (found,) = re.findall(rf'millrace_texts_total{{.*outcome="{outcome}".*}} (\d+)', metrics_of(server))
        return int(found)

    before = {outcome: count(outcome) for outcome in ("refused", "length", "deadline")}
    with Client(Transport.grpc, server.grpc_address) as client:
        client.generate(TEXT, "def f(", options={"max_tokens": 3})
        client.generate(TEXT, "def f(", options={"max_tokens": 0})
        with pytest.raises(tritonclient.utils.InferenceServerException, match="max_tokens is 99999"):
            client.generate(TEXT, "def f(", options={"max_tokens": 99999})
    assert count("refused") == before["refused"] + 1
    assert count("length") == before["length"] + 2
    assert count("deadline") == before["deadline"]


def series(name: str, values: str) -> dict[str, str]:
    return {"series": name, "values": values}


def texts(failed: int) -> list[dict[str, str]]:
    """A thousand answers a step, and failures, and clients that ask for what there is not."""
    steps = {"length": "0+1000x80", "failed": f"0+{failed}x80", "refused": "0+500x80"}
    return [series(f'millrace_texts_total{{model="m_text",outcome="{name}"}}', steps[name]) for name in OUTCOMES]


def first_tokens(slow: int) -> list[dict[str, str]]:
    buckets = {"0.5": 1000 - slow, "2": 1000, "+Inf": 1000}
    name = "millrace_first_token_seconds_bucket"
    return [series(f'{name}{{model="m_text",le="{end}"}}', f"0+{count}x80") for end, count in buckets.items()]


def scores(p95_us: int) -> list[dict[str, str]]:
    return [series('nv_inference_request_summary_us{model="m",quantile="0.95"}', f"{p95_us}x80")]


def cache(share: float, waiting: int) -> list[dict[str, str]]:
    labels = '{model="m_text",instance="a:1"}'
    return [
        series(f"millrace_cache_used_ratio{labels}", f"{share}x80"),
        series(f"millrace_texts_waiting{labels}", f"{waiting}x80"),
    ]


def drift(ratio: str) -> list[dict[str, str]]:
    return [series(f'{RATIO}{{model="m",version="1",server="replica-1"}}', " ".join([ratio] * 81))]


FIRES = {
    "ServerDown": [series('up{job="millrace",instance="a:1"}', "1x10 0x70")],
    "ErrorShare": texts(20),
    "FirstTokenLate": first_tokens(100),
    "ScoresLate": scores(251_000),
    "QueueGrowing": cache(0.5, 65),
    "CacheFull": cache(0.96, 1),
    "Drift": drift("1.01"),
    "DriftUnknown": drift("NaN"),
}
IS_SILENT = {
    "ServerDown": [series('up{job="millrace",instance="a:1"}', "1x80")],
    "ErrorShare": texts(9),
    "FirstTokenLate": first_tokens(40),
    "ScoresLate": scores(249_000),
    "QueueGrowing": cache(0.5, 64),
    "CacheFull": cache(0.96, 0),
    "Drift": drift("0.99"),
    "DriftUnknown": drift("+Inf"),
}


@needs_prometheus
def test_alerts_fire_past_their_limits_and_are_silent_within(tmp_path: Path) -> None:
    monitor(Config(artifacts_dir=tmp_path))
    directory = tmp_path / "monitoring"
    check = ["promtool", "check", "config", str(directory / "prometheus.yml")]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    tests = [
        {
            "interval": "5s",
            "name": f"{name} {'fires' if cases is FIRES else 'is silent'}",
            "input_series": cases[name],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="Millrace{name}",alertstate="firing"}}) or vector(0)',
                    "eval_time": "400s",
                    "exp_samples": [{"labels": "{}", "value": int(cases is FIRES)}],
                }
            ],
        }
        for cases in (FIRES, IS_SILENT)
        for name in FIRES
    ]
    assert {f"Millrace{name}" for name in FIRES} == {
        rule["alert"] for rule in alert_rules(MonitorConfig())["groups"][0]["rules"]
    }
    path = directory / "tests.yml"
    YAML().dump({"rule_files": ["alerts.yml"], "evaluation_interval": "5s", "tests": tests}, path)
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def prometheus(directory: Path) -> Iterator[Callable[[], set[str]]]:
    """A running Prometheus; gives the names of the alerts that fire."""
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
    ]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def firing() -> set[str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/alerts") as response:
                alerts: list[dict[str, Any]] = json.load(response)["data"]["alerts"]
        except OSError:  # it is still starting
            assert process.poll() is None, (directory / "log").read_text()
            return set()
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    try:
        yield firing
    finally:
        stop_sessions([process], 10)


@needs_prometheus
@pytest.mark.server
def test_prometheus_calls_when_texts_fail_and_when_the_server_is_gone(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.entry.path / "repo", tmp_path / "repo")
    deadline = time.monotonic() + DEADLINE_S
    with InferenceServer(tmp_path / "repo", [NAME, TEXT], tmp_path / "server.log") as running:
        watched = MonitorConfig(targets=(running.metrics_address,), scrape_interval_s=1, window_s=10, hold_s=0)
        monitor(Config(artifacts_dir=tmp_path, monitor=watched))
        with prometheus(tmp_path / "monitoring") as firing:
            with Client(Transport.http, running.http_address) as client:
                while "MillraceErrorShare" not in firing():
                    assert time.monotonic() < deadline
                    with pytest.raises(tritonclient.utils.InferenceServerException, match="timeout_ms has passed"):
                        client.generate(TEXT, "def f(" * 9, options={"max_tokens": 28, "timeout_ms": 1})
            running.__exit__(None, None, None)
            while "MillraceServerDown" not in firing():
                assert time.monotonic() < deadline
                time.sleep(0.1)
