from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from flows.artifact import Artifact
from flows.config import ConfigError
from flows.config.compression import LatencyConfig
from flows.evaluation import latency
from flows.evaluation.latency import take_turns


class Recorder:
    """A program that notes when it was asked."""

    def __init__(self, name: str, calls: list[str], busy_s: float = 0.0) -> None:
        self.name, self.calls, self.busy_s = name, calls, busy_s
        self.shapes: set[tuple[int, ...]] = set()

    def next_token_scores(self, input_ids, attention_mask):
        self.calls.append(self.name)
        self.shapes |= {input_ids.shape, attention_mask.shape}
        assert attention_mask.all()
        until = time.perf_counter() + self.busy_s
        while time.perf_counter() < until:
            pass
        return np.zeros((len(input_ids), 2), np.float32)


def test_programs_take_turns_and_none_is_always_first():
    calls: list[str] = []
    programs = {name: Recorder(name, calls) for name in "abc"}
    timings = take_turns(programs, batch_size=2, tokens=5, requests=30)
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(rounds) == 33  # 3 of warm-up
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert Counter(names[0] for names in rounds) == {"a": 11, "b": 11, "c": 11}
    assert Counter(names[2] for names in rounds) == {"a": 11, "b": 11, "c": 11}
    assert programs["a"].shapes == {(2, 5)}
    assert all(timing.requests == 30 for timing in timings.values())


def test_times_are_those_of_the_requests():
    calls: list[str] = []
    timings = take_turns({"slow": Recorder("slow", calls, 0.004), "fast": Recorder("fast", calls)}, 4, 8, 20)
    slow, fast = timings["slow"], timings["fast"]
    assert slow.p95_ms >= slow.p50_ms >= 4.0
    assert fast.p50_ms < slow.p50_ms
    assert slow.requests_per_s <= 1 / 0.004
    assert slow.tokens_per_s == pytest.approx(slow.requests_per_s * 4 * 8, rel=1e-2)


def program_artifact(path) -> Artifact:
    """A small program with the interface of all programs: scores are the ids that the mask leaves, summed."""
    path.mkdir()
    ids, mask = (
        helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "l"]) for n in ("input_ids", "attention_mask")
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 1])
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["real"]),
        helper.make_node("Cast", ["real"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["values", "last"], ["logits"], keepdims=1),
    ]
    axis = helper.make_tensor("last", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "program", [ids, mask], [logits], [axis])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path / "model.onnx")
    return Artifact("program", "key", "digest", path)


def test_stage_measures_every_candidate_at_both_batch_sizes(tmp_path):
    parents = {name: program_artifact(tmp_path / name) for name in ("base", "base_int8")}
    metrics = latency.build(tmp_path, LatencyConfig(tokens=16, requests=200), parents)
    assert list(metrics) == ["base", "base_int8"]
    for timing in metrics.values():
        assert 0 < timing["resident_bytes"] < 2**30
        assert timing["cpu_s_per_1000_tokens"] > 0
        assert timing["p50_ms"] == timing["latency"]["p50_ms"] > 0
        assert timing["latency"]["batch_size"] == 1
        assert timing["latency"]["requests"] == 200
        assert timing["throughput"]["batch_size"] == 8
        assert timing["throughput"]["requests"] == 25
        assert timing["throughput"]["tokens_per_s"] > 0
    assert json.loads((tmp_path / "latency.json").read_text()) == metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": 19}, "evaluate.latency.requests=19 must be 20 or more"),
        ({"tokens": 0}, "evaluate.latency.tokens=0 must be greater than 0"),
        ({"batch_size": 16}, "evaluate.latency.throughput_batch_size=8 must not be smaller"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LatencyConfig(**changes)
