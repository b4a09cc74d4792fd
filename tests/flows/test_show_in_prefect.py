"""Prefect artifacts of a run, in a real Prefect server."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.context import get_run_context
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.artifact import Artifact
from flows.chain import ChainResult
from flows.config import Config
from flows.config.serving import PublishConfig
from flows.report.stage import PLOTS
from flows.run_record import RunRecord
from flows.show_in_prefect import show_in_prefect
from tests.report.made_up_run import BITS_PER_BYTE, STEPS, make_run

CONFIG = Config(name="nightly", steps=STEPS, publish=PublishConfig(model_name="tiny"))
ROWS = {
    "corpus": {"ran": False, "reason": "its artifact exists and verifies", "key": "corpus-1", "seconds": 0.2},
    "student": {"ran": True, "reason": "temperature changed from 2.0 to 3.0", "key": "student-2", "seconds": 61.3},
}


@pytest.fixture
def prefect_server(api_url: str, tmp_path: Path) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: api_url, PREFECT_HOME: tmp_path / "home"}):
        yield


def shown(parents: dict[str, Artifact], directory: Path) -> dict[str, Any]:
    """Data of the flow run's artifacts by key, as the server has them."""
    for file in PLOTS.values():
        (parents["corpus"].path / file).write_text("<svg/>")
    published = parents.get("publish")
    result = ChainResult(parents["gates"], parents["corpus"], parents.get("passport"), published)
    record = RunRecord(directory / "runs" / CONFIG.name / "stages.json", {}, ROWS)

    @flow
    def run() -> str:
        show_in_prefect(result, record)
        return str(get_run_context().flow_run.id)

    flow_run_id = run()
    with get_client(sync_client=True) as client:
        mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        return {str(artifact.key): artifact.data for artifact in client.read_artifacts(artifact_filter=mine)}


@pytest.mark.usefixtures("prefect_server")
def test_a_published_run(tmp_path: Path) -> None:
    artifacts = shown(make_run(tmp_path / "store", CONFIG), tmp_path)
    candidates = {row["candidate"]: row for row in json.loads(artifacts["candidates"])}
    assert {name: row["gates"] for name, row in candidates.items()} == {
        "base": "passed",
        "student": "passed",
        "base_int8": "rejected",
        "student_int8": "chosen",
    }
    assert candidates["student_int8"]["program"] == "1.60 MB"
    assert candidates["student_int8"]["Pareto front"] == "program_bytes, p50_ms"
    assert candidates["student_int8"]["in memory"] == "3.20 MB"
    assert b64decode(artifacts["pareto-size"].rpartition(",")[2]) == b"<svg/>"
    assert artifacts["pareto-latency"].startswith("data:image/svg+xml;base64,")
    assert "p50 latency in ms 9.87 is 1.049 x" in candidates["base_int8"]["reasons"]
    assert "tiny version 3 is published" in artifacts["verdict"]
    assert "| checks passed | 297 of 297 |" in artifacts["verdict"]
    assert [(row["stage"], row["did"], row["took"]) for row in json.loads(artifacts["stages"])] == [
        ("corpus", "skipped", "0.2 s"),
        ("student", "ran", "1 min 01 s"),
    ]
    assert "temperature changed from 2.0 to 3.0" in artifacts["stages"]
    assert (tmp_path / "runs" / "nightly" / "report.html").as_uri() in artifacts["report"]


@pytest.mark.usefixtures("prefect_server")
def test_a_run_that_published_nothing(tmp_path: Path) -> None:
    worse = {name: value + 0.7 for name, value in BITS_PER_BYTE.items()}
    artifacts = shown(make_run(tmp_path / "store", CONFIG, worse), tmp_path)
    assert "## Nothing was published" in artifacts["verdict"]
    for name in CONFIG.candidates:
        assert f"- {name}: bits per byte" in artifacts["verdict"]
