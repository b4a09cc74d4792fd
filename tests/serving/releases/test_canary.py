"""A version under canary is judged by its answers, errors and time, and taken back with the reason."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from flows.config.canary import CanaryConfig
from flows.serving.client import Client, Transport
from flows.serving.releases import promotion
from flows.serving.releases.canary import WHO, Answers, CanaryWatch, Samples, counted, judge
from flows.serving.releases.served_view import Pool
from flows.serving.releases.state import read_aliases, read_history, record_published
from flows.serving.repository import lock_repository
from flows.serving.server import InferenceServer
from tests.serving.tiny_chain import NAME

CONFIG = CanaryConfig(min_requests=10, max_error_share=0.05, max_latency_ratio=2.0)


@pytest.mark.parametrize(
    ("candidate", "live", "reason"),
    [
        (Answers(9, 9, 9.0), Answers(100, 0, 1.0), None),
        (Answers(100, 0, 1.0), Answers(9, 0, 0.01), None),
        (Answers(100, 5, 1.0), Answers(100, 0, 1.0), None),
        (Answers(100, 6, 1.0), Answers(100, 0, 1.0), "6 of its 100 requests failed, 0 of 100 of the live version's"),
        (Answers(100, 20, 1.0), Answers(100, 16, 1.0), None),
        (Answers(100, 0, 2.0), Answers(100, 0, 1.0), None),
        (Answers(100, 0, 2.1), Answers(100, 0, 1.0), "its requests take 21.0 ms, the live version's 10.0 ms"),
        (Answers(100, 5, 1.95), Answers(100, 0, 1.0), "its requests take 20.5 ms"),  # errors take no time
        (Answers(10, 0, 0.1), Answers(1000, 0, 10.0), None),
    ],
)
def test_a_candidate_is_judged_against_the_live_version(candidate: Answers, live: Answers, reason: str | None) -> None:
    told = judge(candidate, live, CONFIG)
    assert (reason in told) if reason else (told == "")


def test_only_what_came_since_counts() -> None:
    before, now = Answers(100, 50, 10.0), Answers(150, 50, 11.0)
    assert now.since(before) == Answers(50, 0, 1.0)
    assert Answers(3, 0, 0.1).since(before) == Answers(3, 0, 0.1), "a server that was started again counts from zero"


@pytest.fixture
def repository(live_repository: Path) -> Path:
    """Version 1, which the server serves, is under canary."""
    with lock_repository(live_repository):
        for model in (NAME, f"{NAME}_text"):
            shutil.copytree(live_repository / model / "1", live_repository / model / "2")
        record_published(live_repository, NAME, 2, live=False)
    return live_repository


def change_one_weight(program: Path) -> None:
    model = onnx.load(program)
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight).copy()
        if values.ndim == 2 and values.dtype.kind == "f":
            values *= 1.01
            weight.CopyFrom(numpy_helper.from_array(values, weight.name))
            onnx.save(model, program)
            return
    raise AssertionError("there is no matrix of weights")


@pytest.mark.server
def test_served_scores_are_those_of_the_program(server: InferenceServer, repository: Path) -> None:
    assert Samples(repository, NAME, 1, 4).drift(server) == ""
    change_one_weight(repository / NAME / "1" / "model.onnx")
    told = Samples(repository, NAME, 1, 4).drift(server)
    assert "served scores of" in told
    assert "its passport allows" in told


def watch_until_it_aborts(repository: Path, server: InferenceServer, errors: Iterator[int]) -> str:
    """Why version 2 was taken back; the pools have answered 100 requests more at each look, with these errors."""
    requests = itertools.count(0, 100)
    watch = CanaryWatch(
        *(repository, NAME, 2, 1),
        servers=lambda: (server, [server]),
        answers=lambda pool: (next(requests), next(errors) if pool is Pool.candidate else 0),
        config=CanaryConfig(check_interval_s=0.01, samples=2),
    )
    watch.start()
    wait = threading.Event()
    for _ in range(6000):
        if read_aliases(repository, NAME).candidate is None:
            break
        wait.wait(0.01)
    watch.stop()
    last = read_history(repository, NAME)[-1]
    assert (last["verb"], last["who"], last["version"]) == ("abort", WHO, 2)
    return str(last["why"])


@pytest.mark.server
def test_wrong_answers_take_the_candidate_back(server: InferenceServer, repository: Path) -> None:
    promotion.canary(repository, NAME, 0.1)
    # this server knows version 1 only: whatever it answers for version 2 is no answer
    why = watch_until_it_aborts(repository, server, itertools.repeat(0))
    assert "it cannot answer a sample of 1 tokens" in why
    assert (repository / NAME / "2" / "model.onnx").exists(), "nothing is removed"


@pytest.mark.server
def test_errors_take_the_candidate_back(
    server: InferenceServer, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promotion.canary(repository, NAME, 0.1)
    monkeypatch.setattr(Samples, "drift", lambda *_: "")
    why = watch_until_it_aborts(repository, server, itertools.count(0, 10))
    assert "HTTP: " in why
    assert "requests failed, 0 of" in why


@pytest.mark.server
def test_counters_are_those_of_the_server(server: InferenceServer) -> None:
    import numpy as np
    from tritonclient.utils import InferenceServerException

    before = counted(server, NAME, 1)
    ids = np.array([[1, 2]], np.int64)
    with Client(Transport.grpc, server.grpc_address) as client:
        for _ in range(3):
            client.scores(NAME, ids, np.ones_like(ids))
        with pytest.raises(InferenceServerException):
            client.scores(NAME, -ids, np.ones_like(ids))
    since = counted(server, NAME, 1).since(before)
    while since.requests < 4:  # the server counts after it answers
        since = counted(server, NAME, 1).since(before)
    assert since.seconds > 0
