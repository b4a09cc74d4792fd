"""What serving adds to a request: latency over HTTP and gRPC against the same program in this process.

python -m flows.serving.bench model_repo millrace

Then how long a request spends in which part of the server, by the server's own clock: in its queue, on the way into the
model's process, there, and on the way out. What is left of the added time is transport and client.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flows.config import ConfigError, RunError
from flows.export.runtime import Program
from flows.serving.client import Client, Transport
from flows.serving.repository import complete_versions
from flows.serving.server import InferenceServer

REQUESTS = 300
WARMUP_REQUESTS = 30
PARTS = ("queue", "compute_input", "compute_infer", "compute_output")
"""Of a request's time in the server, as its statistics name them."""
ULPS = 4
"""Served scores may differ from those in this process by this many units in the last place of the largest score."""


def run(repository: Path, model_name: str, tokens: int = 128) -> None:
    """Prints p50 and p95 latency in process, over HTTP and over gRPC, their ratios, and the server's part of it.

    Requests take turns, so that a busy machine is fair to all. Nothing is timed before all three agree.

    Args:
        repository: Model repository.
        model_name: Published name.
        tokens: Length of the request; shortened to the longest context.

    Raises:
        ConfigError: No such model was published.
        RunError: Served scores differ from those of the program.
    """
    versions = complete_versions(repository, model_name)
    if not versions:
        raise ConfigError(f"publish.model_name={model_name} has no version in {repository}. Publish one first.")
    version = repository / model_name / str(versions[-1])
    settings = json.loads((version / "settings.json").read_text())
    program = Program(version, settings["threads"])
    ids = np.arange(min(tokens, settings["sequence_length"]), dtype=np.int64)[None] % 256
    mask = np.ones_like(ids)
    with (
        tempfile.TemporaryDirectory() as scratch,
        InferenceServer(repository, [model_name], Path(scratch) / "server.log") as server,
        Client(Transport.http, server.http_address) as http,
        Client(Transport.grpc, server.grpc_address) as grpc,
    ):
        ways: dict[str, Callable[[], NDArray[np.float32]]] = {
            "in process": lambda: program.next_token_scores(ids, mask),
            "HTTP": lambda: http.scores(model_name, ids, mask),
            "gRPC": lambda: grpc.scores(model_name, ids, mask),
        }
        _check_agreement({name: way() for name, way in ways.items()})
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(WARMUP_REQUESTS + REQUESTS):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
        parts = _mean_ms(server.http_address, model_name)
    print(f"{model_name} version {versions[-1]}, batch 1, {ids.shape[1]} tokens, {REQUESTS} requests each, in turns")
    print(f"{'':12}{'p50 ms':>10}{'p95 ms':>10}{'p50 ratio':>12}{'p50 added ms':>15}")
    base, _ = _percentiles(seconds["in process"])
    for name, values in seconds.items():
        p50, p95 = _percentiles(values)
        print(f"{name:12}{p50:10.2f}{p95:10.2f}{p50 / base:12.2f}{p50 - base:15.2f}")
    print("in the server, mean ms: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))


def _check_agreement(scores: dict[str, NDArray[np.float32]]) -> None:
    expected = scores["in process"]
    tolerance = ULPS * float(np.finfo(np.float32).eps * np.abs(expected).max())
    for name, values in scores.items():
        if (difference := float(np.abs(values - expected).max())) > tolerance:
            raise RunError(
                f"Scores over {name} differ from those in process by {difference:.3g}, more than {tolerance:.3g}. "
                "Nothing was timed."
            )


def _mean_ms(address: str, model_name: str) -> dict[str, float]:
    """Mean milliseconds of a request in each part of the server."""
    with urllib.request.urlopen(f"http://{address}/v2/models/{model_name}/stats") as response:
        (told,) = json.loads(response.read())["model_stats"]
    parts = {name: told["inference_stats"][name] for name in PARTS}
    return {name: part["ns"] / 1e6 / max(1, part["count"]) for name, part in parts.items()}


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    p50, p95 = np.percentile(np.array(seconds[WARMUP_REQUESTS:]) * 1e3, [50, 95])
    return float(p50), float(p95)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("model_name")
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    run(arguments.repository, arguments.model_name, arguments.tokens)
