from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.config.compression import GatesConfig, GatingConfig
from flows.config.steps import StepConfig
from flows.evaluation import gates
from flows.evaluation.gates import Row, choose, judge

UNIGRAM = 3.08
STEPS = {
    "student": StepConfig(distill="base"),
    "base_int8": StepConfig(quantize="base"),
    "student_int8": StepConfig(quantize="student"),
    "pruned": StepConfig(prune="base"),
    "healed": StepConfig(distill="base", start="pruned"),
}
P50_MS = {"base": 10.0, "student": 4.0, "base_int8": 6.0, "student_int8": 3.0, "pruned": 6.0, "healed": 6.0}
MEGABYTES = {"base": 16.0, "student": 4.0, "base_int8": 4.1, "student_int8": 1.1, "pruned": 9.0, "healed": 9.0}


def row(name: str, **changes) -> Row:
    """A candidate that passes every gate."""
    p50, size = P50_MS[name], int(MEGABYTES[name] * 1e6)
    step = STEPS.get(name)
    plain = Row(name, step and step.source, step and step.kind, 2.0, 2.5, 7.4, 0.5, 4_000_000, size, p50, 2 * p50, 1e4)
    return replace(plain, start=step and step.start, **changes)


def table(**changes) -> dict[str, Row]:
    """Judged candidates by name; `changes` by name."""
    rows = judge([row(name, **changes.get(name, {})) for name in ("base", *STEPS)], GatesConfig(), UNIGRAM)
    return {judged.name: judged for judged in rows}


def test_candidates_that_earn_their_place_pass():
    rows = table()
    assert all(judged.passed and judged.reasons == () for judged in rows.values())
    assert rows["base"].p50_ratio is None
    assert rows["student_int8"].p50_ratio == 0.75
    assert rows["student_int8"].bytes_ratio == 0.275
    assert rows["student_int8"].loss_ratio == 1.0


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("base", {"bits_per_byte": 3.31}, "bits per byte 3.31 does not beat the unigram model's 3.08"),
        ("base", {"bits_per_byte": UNIGRAM}, "bits per byte 3.08 does not beat the unigram model's 3.08"),
        ("student", {"loss": 2.8}, "test loss 2.8 is 1.4 x the 2 of base, above evaluate.gates.max_loss_ratio=1.35"),
        (
            "base_int8",
            {"loss": 2.03},
            "test loss 2.03 is 1.015 x the 2 of base, above evaluate.gates.max_quantized_loss_ratio=1.01",
        ),
        (
            "student_int8",
            {"program_bytes": 1_400_000},
            "program size in MB 1.4 is 0.35 x the 4 of student, above evaluate.gates.max_quantized_bytes_ratio=0.3",
        ),
        (
            "base_int8",
            {"p50_ms": 10.5},
            "p50 latency in ms 10.5 is 1.05 x the 10 of base, above evaluate.gates.max_compressed_latency_ratio=1",
        ),
        (
            "student_int8",
            {"p50_ms": 5.0},
            "p50 latency in ms 5 is 1.25 x the 4 of student, above evaluate.gates.max_compressed_latency_ratio=1",
        ),
        (
            "pruned",
            {"program_bytes": 15_990_000},
            "program size in MB 15.99 is 0.9994 x the 16 of base, above evaluate.gates.max_compressed_bytes_ratio=0.98",
        ),
        (
            "healed",
            {"sparse": "0.5"},
            "0.5 of its layers' weights are zeros, which its program stores and multiplies like others",
        ),
        (
            "pruned",
            {"sparse": "2:4"},
            "2:4 sparsity is run by sparse tensor cores of NVIDIA GPUs from compute capability 8.0 on; its program is "
            "dense and stores and multiplies every zero",
        ),
        ("pruned", {"faults": ("0.5 of its scores are not finite",)}, "0.5 of its scores are not finite"),
        (
            "student",
            {"p50_ms": 11.0},
            "p50 latency in ms 11 is 1.1 x the 10 of base, above evaluate.gates.max_compressed_latency_ratio=1",
        ),
    ],
)
def test_each_gate_says_why(name, changes, reason):
    judged = table(**{name: changes})[name]
    assert judged.reasons == (reason,)
    assert not judged.passed


def test_limits_themselves_pass():
    rows = table(base_int8={"loss": 2.02, "program_bytes": 4_800_000, "p50_ms": 10.0}, student={"loss": 2.7})
    assert rows["base_int8"].passed
    assert rows["student"].passed


def test_quantizing_a_weak_student_is_measured_against_both():
    rows = table(student={"loss": 2.6}, student_int8={"loss": 2.72})
    assert rows["student"].passed
    assert [reason.split(",")[0] for reason in rows["student_int8"].reasons] == [
        "test loss 2.72 is 1.36 x the 2 of base",
        "test loss 2.72 is 1.046 x the 2.6 of student",
    ]


def test_a_diverged_model_fails_every_comparison():
    judged = table(student={"loss": float("nan"), "bits_per_byte": float("nan")})["student"]
    assert judged.reasons[0] == "test loss is nan"
    assert len(judged.reasons) == 3


def test_unigram_gate_can_be_turned_off():
    rows = judge([row("base", bits_per_byte=9.0)], GatesConfig(beat_unigram=False), UNIGRAM)
    assert rows[0].passed


def test_healing_is_measured_by_the_share_of_the_loss_that_it_wins_back():
    rows = table(pruned={"loss": 2.4}, healed={"loss": 2.1})
    assert rows["healed"].recovered == pytest.approx(0.75)
    assert rows["healed"].loss_ratio == pytest.approx(1.05)  # over its teacher's
    assert rows["student"].recovered is None
    assert table(pruned={"loss": 2.0})["healed"].recovered is None  # nothing was lost


def test_a_sparse_candidate_may_be_quantized():
    assert table(base_int8={"sparse": "0.5"})["base_int8"].passed


def test_auto_takes_the_fastest_that_passed():
    rows = table(student_int8={"loss": 2.5})
    assert choose(list(rows.values()), "auto") == (
        "student",
        "the fastest of 5 candidates that passed the gates, of 6 made",
    )


def test_auto_with_none_passed_says_why_for_each():
    rows = judge([row("base", bits_per_byte=3.5)], GatesConfig(), UNIGRAM)
    chosen, choice = choose(rows, "auto")
    assert chosen is None
    assert "base: bits per byte 3.5 does not beat the unigram model's 3.08" in choice


def test_a_named_candidate_must_pass():
    rows = list(table(base_int8={"p50_ms": 12.0}).values())
    assert choose(rows, "base")[0] == "base"
    assert choose(rows, "none") == (
        None,
        f"publish.candidate=none: {sum(row.passed for row in rows)} of {len(rows)} candidates passed the gates",
    )
    chosen, choice = choose(rows, "base_int8")
    assert chosen is None
    assert choice.startswith(
        "publish.candidate=base_int8 failed the gates: p50 latency in ms 12 is 1.2 x the 10 of base"
    )


def test_stage_reads_the_artifacts_of_every_candidate(tmp_path: Path):
    def measured(metrics) -> Artifact:
        return Artifact("stage", "key", "digest", tmp_path, metrics)

    parents = {"baselines": measured({"unigram_bits_per_byte": UNIGRAM})}
    latency = {}
    for name, speed in {"base": 10.0, "base_int8": 6.0}.items():
        quality = {"loss": 2.0, "bits_per_byte": 2.5, "perplexity": 7.4, "accuracy": 0.5, "faults": []}
        parents[f"quality:{name}"] = measured(quality)
        parents[f"program:{name}"] = measured({"parameters": 5, "program_bytes": 16_000_000 if name == "base" else 10})
        latency[name] = {"p50_ms": speed, "p95_ms": 2 * speed, "throughput": {"tokens_per_s": 3.0}}
    parents["latency"] = measured(latency)
    metrics = gates.build(tmp_path, GatingConfig(steps=STEPS, gates=GatesConfig(), candidate="auto"), parents)
    assert metrics["chosen"] == "base_int8"
    assert [candidate["name"] for candidate in metrics["candidates"]] == ["base", "base_int8"]
    assert metrics["candidates"][1]["p95_ms"] == 12.0
    assert json.loads((tmp_path / "gates.json").read_text())["chosen"] == "base_int8"
