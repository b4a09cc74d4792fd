from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.config import ConfigError
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
    plain = Row(
        name=name,
        source=step and step.source,
        kind=step and step.kind,
        loss=2.0,
        bits_per_byte=2.5,
        perplexity=7.4,
        accuracy=0.5,
        parameters=4_000_000,
        program_bytes=size,
        p50_ms=p50,
        p95_ms=2 * p50,
        throughput=1e4,
        word_accuracy=0.3,
        agreement=0.9,
        divergence=0.1,
        resident_bytes=2 * size,
        cpu_s_per_1000_tokens=0.02,
        tasks={},
        weight_bits=8 if step and step.quantize else None,
        start=step and step.start,
    )
    return replace(plain, **changes)


def table(gates: GatesConfig | None = None, **changes) -> dict[str, Row]:
    """Judged candidates by name; `changes` by name."""
    rows = judge([row(name, **changes.get(name, {})) for name in ("base", *STEPS)], gates or GatesConfig(), UNIGRAM)
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
            "test loss 2.03 is 1.015 x the 2 of base, above evaluate.gates.max_8bit_loss_ratio=1.01",
        ),
        (
            "student_int8",
            {"program_bytes": 1_400_000},
            "program size in MB 1.4 is 0.35 x the 4 of student, above evaluate.gates.max_8bit_bytes_ratio=0.3",
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
            "dense and stores and multiplies every zero. Prune to a smaller shape instead",
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


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"loss": 2.06, "program_bytes": 2_720_000}, []),
        (
            {"loss": 2.07, "program_bytes": 2_800_000},
            [
                "test loss 2.07 is 1.035 x the 2 of base, above evaluate.gates.max_4bit_loss_ratio=1.03",
                "program size in MB 2.8 is 0.175 x the 16 of base, above evaluate.gates.max_4bit_bytes_ratio=0.17",
            ],
        ),
    ],
)
def test_four_bits_are_held_to_limits_of_their_own(changes, reasons):
    assert list(table(base_int8={"weight_bits": 4, **changes})["base_int8"].reasons) == reasons


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(("size", "p50"), [(16_100_000, 10.1), (16_100_000, 9.0), (1_000_000, 10.1)])
def test_what_is_not_smaller_or_not_faster_is_rejected_whatever_it_is(bits, size, p50):
    judged = table(base_int8={"weight_bits": bits, "program_bytes": size, "p50_ms": p50})["base_int8"]
    reasons = " ".join(judged.reasons)
    assert ("program size in MB 16.1 is 1.006 x the 16 of base" in reasons) == (size > 16e6)
    assert ("p50 latency in ms 10.1 is 1.01 x the 10 of base" in reasons) == (p50 > 10)
    assert not judged.passed


@pytest.mark.parametrize(
    ("gate", "changes", "reason"),
    [
        ({"max_loss": 1.9}, {}, "test loss 2 is above evaluate.gates.max_loss=1.9"),
        (
            {"max_divergence": 0.2},
            {"divergence": 0.21},
            "KL from base 0.21 nats per token is above evaluate.gates.max_divergence=0.2",
        ),
        (
            {"min_agreement": 0.8},
            {"agreement": 0.79},
            "agreement with base 0.79 is below evaluate.gates.min_agreement=0.8",
        ),
        ({"max_divergence": 0.2}, {"divergence": float("nan")}, "KL from base nan nats per token is above evaluate.ga"),
    ],
)
def test_gates_that_are_off_unless_set(gate, changes, reason):
    assert table(student=changes)["student"].passed
    judged = table(GatesConfig(**gate), student=changes)
    assert judged["student"].reasons[0].startswith(reason)
    assert judged["base"].passed == ("max_loss" not in gate)


def test_a_limit_that_nothing_can_keep_is_refused():
    with pytest.raises(ConfigError, match=r"evaluate.gates.min_agreement=1.2 must lie between 0 and 1"):
        GatesConfig(min_agreement=1.2)
    with pytest.raises(ConfigError, match=r"evaluate.gates.max_divergence=0 must be greater than 0"):
        GatesConfig(max_divergence=0)


def test_fronts_are_told_for_size_and_for_latency():
    rows = table(student={"loss": 2.1}, student_int8={"loss": 2.1}, base_int8={"loss": 2.0, "p50_ms": 11.0})
    fronts = {name: judged.fronts for name, judged in rows.items() if judged.fronts}
    assert "base_int8" not in fronts, "it was rejected"
    assert fronts["student_int8"] == ("program_bytes", "p50_ms")
    assert "student" not in fronts, "the same loss, larger and slower"


def test_limits_themselves_pass():
    limits = GatesConfig(max_loss=2.7, min_agreement=0.9, max_divergence=0.1)
    rows = table(limits, base_int8={"loss": 2.02, "program_bytes": 4_800_000, "p50_ms": 10.0}, student={"loss": 2.7})
    assert rows["base_int8"].passed
    assert rows["student"].passed


def test_quantizing_a_weak_student_is_measured_against_both():
    rows = table(student={"loss": 2.6}, student_int8={"loss": 2.72})
    assert rows["student"].passed
    assert rows["student_int8"].base_loss_ratio == pytest.approx(1.36)
    assert rows["student_int8"].loss_ratio == pytest.approx(1.046, abs=5e-4)
    assert [reason.split(",")[0] for reason in rows["student_int8"].reasons] == [
        "test loss 2.72 is 1.36 x the 2 of base",
        "test loss 2.72 is 1.046 x the 2.6 of student",
    ]


def test_a_diverged_model_fails_every_comparison():
    judged = table(student={"loss": float("nan"), "bits_per_byte": float("nan")})["student"]
    assert judged.reasons[0] == "test loss is nan"
    assert len(judged.reasons) == 3


def test_labels_have_to_be_told_apart_better_than_by_a_constant_answer():
    def judged(accuracy: float, **gates) -> Row:
        one = row("base", bits_per_byte=None, macro_f1=0.4, accuracy=accuracy)
        (found,) = judge([one], GatesConfig(**gates), baseline=0.5)
        return found

    assert judged(0.51).passed
    assert judged(0.5).reasons == ("accuracy 0.5 does not beat the 0.5 of always naming the most frequent label",)
    assert judged(0.5, beat_unigram=False).passed


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
    rows = table(student_int8={"loss": 2.5}, base_int8={"p50_ms": 3.5})
    assert choose(list(rows.values()), "auto")[0] == "base_int8"  # though student is smaller


def test_auto_with_none_passed_says_why_for_each():
    rows = judge([row("base", bits_per_byte=3.5)], GatesConfig(), UNIGRAM)
    chosen, choice = choose(rows, "auto")
    assert chosen is None
    assert "base: bits per byte 3.5 does not beat the unigram model's 3.08" in choice


def test_a_named_candidate_must_pass():
    rows = list(table(base_int8={"p50_ms": 12.0}).values())
    assert choose(rows, "base")[0] == "base"
    assert choose(rows, "none") == (None, "publish.candidate=none: 5 of 6 candidates passed the gates")
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
        quality = {"loss": 2.0, "bits_per_byte": 2.5, "perplexity": 7.4, "accuracy": 0.5, "word_accuracy": None}
        quality |= {"macro_f1": None, "agreement": 1.0, "divergence": 0.0, "tasks": {"choice acc": 0.25}, "faults": []}
        parents[f"quality:{name}"] = measured(quality)
        parents[f"program:{name}"] = measured({"parameters": 5, "program_bytes": 16_000_000 if name == "base" else 10})
        latency[name] = {"p50_ms": speed, "p95_ms": 2 * speed, "throughput": {"tokens_per_s": 3.0}}
        latency[name] |= {"resident_bytes": 7, "cpu_s_per_1000_tokens": 0.5}
    parents["latency"] = measured(latency)
    metrics = gates.build(
        tmp_path,
        GatingConfig(steps=STEPS, gates=GatesConfig(), candidate="auto", weight_bits={"base_int8": 8}),
        parents,
    )
    assert metrics["chosen"] == "base_int8"
    assert [candidate["name"] for candidate in metrics["candidates"]] == ["base", "base_int8"]
    assert metrics["candidates"][1]["p95_ms"] == 12.0
    assert metrics["candidates"][1]["weight_bits"] == 8
    assert metrics["candidates"][1]["tasks"] == {"choice acc": 0.25}
    assert metrics["candidates"][1]["resident_bytes"] == 7
    assert json.loads((tmp_path / "gates.json").read_text())["chosen"] == "base_int8"
