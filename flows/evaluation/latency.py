"""Stage: how long each candidate's program takes, in this process; candidates take turns, request by request.

Memory and processor seconds, which others in the same process would blur, are measured in a process for each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flows.artifact import Artifact, write_json_atomically
from flows.config.compression import LatencyConfig
from flows.evaluation.footprint import Load, measure_footprint
from flows.export.runtime import Program

Ids = NDArray[np.int64]


class Runs(Protocol):
    """What is timed."""

    def next_token_scores(self, input_ids: Ids, attention_mask: Ids) -> NDArray[np.float32]:
        """Scores [batch, vocab]."""


@dataclass(frozen=True)
class Timing:
    """Times of one candidate at one batch size."""

    batch_size: int
    requests: int
    p50_ms: float
    p95_ms: float
    requests_per_s: float
    """One caller that asks again as soon as it is answered."""
    tokens_per_s: float


def build(directory: Path, config: LatencyConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes latency.json.

    Args:
        directory: Where it goes.
        config: Size and number of the timed requests.
        parents: Every candidate's program, by the candidate's name.

    Returns:
        For each candidate `p50_ms` and `p95_ms` of a request of `latency.batch_size`, and the fields of `Timing` below
        `latency` and, at `latency.throughput_batch_size`, below `throughput`, of whose requests
        `cpu_s_per_1000_tokens` is, too; `resident_bytes` after a request of one row.
    """
    programs = {name: Program(artifact.path) for name, artifact in parents.items()}
    latency = take_turns(programs, config.batch_size, config.tokens, config.requests)
    fewer = max(20, config.requests * config.batch_size // config.throughput_batch_size)
    throughput = take_turns(programs, config.throughput_batch_size, config.tokens, fewer)
    load = Load(config.throughput_batch_size, config.tokens, fewer)
    metrics = {
        name: {
            **asdict(measure_footprint(artifact.path, load)),
            "p50_ms": latency[name].p50_ms,
            "p95_ms": latency[name].p95_ms,
            "latency": asdict(latency[name]),
            "throughput": asdict(throughput[name]),
        }
        for name, artifact in parents.items()
    }
    write_json_atomically(directory / "latency.json", metrics)
    return metrics


def take_turns(programs: Mapping[str, Runs], batch_size: int, tokens: int, requests: int) -> dict[str, Timing]:
    """Times `requests` requests of each program, after a tenth as many for warm-up.

    In every round each program answers once, and the round after starts with the next one, so that neither a busy
    moment nor the place in the round favours any.

    Args:
        programs: What to time, by name.
        batch_size: Rows of a request.
        tokens: Length of a row.
        requests: How many are timed.
    """
    names = list(programs)
    ids = np.random.default_rng(0).integers(256, size=(batch_size, tokens), dtype=np.int64)  # every vocabulary has them
    mask = np.ones_like(ids)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm_up = max(1, requests // 10)
    for turn in tqdm(range(warm_up + requests), desc=f"latency, batch {batch_size}", unit="round", disable=None):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            programs[name].next_token_scores(ids, mask)
            took = time.perf_counter() - started
            if turn >= warm_up:
                seconds[name].append(took)
    return {name: _timing(taken, batch_size, tokens) for name, taken in seconds.items()}


def _timing(seconds: list[float], batch_size: int, tokens: int) -> Timing:
    p50, p95 = np.percentile(seconds, [50, 95])
    per_s = len(seconds) / sum(seconds)
    return Timing(
        batch_size=batch_size,
        requests=len(seconds),
        p50_ms=round(1e3 * p50, 4),
        p95_ms=round(1e3 * p95, 4),
        requests_per_s=round(per_s, 2),
        tokens_per_s=round(per_s * batch_size * tokens, 1),
    )
