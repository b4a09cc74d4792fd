"""A real rank with a model of the quickstart: what it measures, and how near the plan came; one that has too little."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.compose import CONF_DIR, compose_config
from flows.config import to_json
from flows.config.engine import EngineConfig
from flows.config.launcher import LauncherConfig
from flows.config.tracking import TrackingConfig
from flows.config.training import TrainingRun
from flows.model import arithmetic
from flows.training.job import TrainingJob
from flows.training.memory_plan import CPU_RUNTIME_BYTES
from kernels.chunk_sizes import CPU_TOKENS

Run = Callable[..., TrainingRun]
STEPS, PROFILED = 5, 3
"""The two profilers, which need memory of their own, look at steps after those whose memory counts."""


def with_vocabulary(data: dict[str, Artifact], directory: Path, vocab_size: int) -> dict[str, Artifact]:
    """The same tokens, said to be of a larger vocabulary."""
    shutil.copytree(data["tokens"].path, directory)
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(index | {"vocab_size": vocab_size}))
    return data | {"tokens": replace(data["tokens"], path=directory)}


@pytest.fixture(scope="module", autouse=True)
def _preloaded_ranks() -> None:
    """A rank that is measured starts as users start it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """A few steps of the quickstart's base model."""
    config = compose_config(["+experiment=quickstart"]).training_runs()["base"]
    report = tmp_path_factory.mktemp("flops") / "flops.txt"
    profiler = {"enabled": True, "profile_step": PROFILED + 1, "detailed": False, "output_file": str(report)}
    return replace(
        config,
        train=replace(config.train, max_steps=STEPS, log_interval_steps=1, eval_tokens=256),
        engine=replace(config.engine, deepspeed={"flops_profiler": profiler}),
        launcher=LauncherConfig(stall_timeout_s=120),
        tracking=TrackingConfig(tensorboard=False, csv=True, profile_steps=(PROFILED, PROFILED + 1)),
    )


@pytest.fixture(scope="module")
def measured(run: TrainingRun, data: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    directory = tmp_path_factory.mktemp("measured")
    larger = with_vocabulary(data, directory / "tokens", 4096)
    return ArtifactStore(directory / "store").make(Stage("base", "flows.training.stage", run, larger))


def test_memory_is_as_planned(measured: Artifact) -> None:
    """Within a tenth of the whole; what the model adds to the runtime within a quarter: the heap's share varies."""
    planned = measured.metrics["plan"]["memory_bytes"]
    peak = next(event["peak_memory_bytes"] for event in measured.metrics["curve"] if event["step"] == PROFILED)
    print(f"planned {planned / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
    assert peak == pytest.approx(planned, rel=0.1)
    assert peak - CPU_RUNTIME_BYTES == pytest.approx(planned - CPU_RUNTIME_BYTES, rel=0.25)


def test_parameters_and_tokens_are_as_planned(measured: Artifact) -> None:
    plan = measured.metrics["plan"]
    assert plan["parameters"] == measured.metrics["parameters"]
    assert plan["tokens"] == measured.metrics["train_tokens"]
    assert plan["epochs"] == pytest.approx(measured.metrics["epochs"], rel=0.05)
    assert plan["fits"]


def test_each_log_says_how_fast_and_how_full(measured: Artifact) -> None:
    events = [event for event in measured.metrics["curve"] if "train_loss" in event]
    assert len(events) == STEPS
    plan = measured.metrics["plan"]
    for event in events:
        mfu = event["tokens_per_s"] * plan["flops"] / plan["tokens"] / plan["peak_flops"]
        assert event["mfu"] == pytest.approx(mfu, abs=1e-4)
        assert 0 < event["loader_share"] < 1
        assert 0 < event["step_ms_p50"] <= event["step_ms_max"]
        assert event["grad_norm"] > 0
    summary = measured.metrics["measured"]
    assert summary["train_s"] == pytest.approx(sum(event["step_ms_max"] for event in events) / 1000, rel=0.01)
    with (measured.path / "logs" / "metrics.csv").open() as file:
        assert len(file.readlines()) == 1 + STEPS + 1


def test_the_chosen_step_is_traced(measured: Artifact, run: TrainingRun) -> None:
    trace = json.loads((measured.path / "logs" / "trace-rank-0.json").read_text())
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    chunks = math.ceil(run.train.micro_batch_size * run.sequence_length / CPU_TOKENS)
    # 7 matrices in each of 4 layers: forward and, on the way back, for input and weight. The head, some tokens at a
    # time: forward and for its input; what is for its weight is added up by a product of another name.
    assert len(products) == 3 * 7 * 4 + 2 * chunks
    assert "aten::mm" in (measured.path / "logs" / "trace-rank-0.txt").read_text()


def test_deepspeeds_flops_profiler_counts_what_was_planned(measured: Artifact, run: TrainingRun) -> None:
    """It counts one forward pass, all matrix products but those of fused attention, which it does not know.

    The head's gradients are computed on the way forward.
    """
    report = Path(run.engine.deepspeed["flops_profiler"]["output_file"]).read_text()
    counted = re.search(r"fwd flops per GPU[ =]*:? *([\d.]+) *([GMT])", report)
    assert counted, report
    flops = float(counted[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[counted[2]]
    tokens = run.train.micro_batch_size * run.sequence_length
    head = 4096 * run.model.hidden_size
    assert flops == pytest.approx(
        2 * tokens * (arithmetic.matrix_parameter_count(run.model, 4096) + 2 * head), rel=0.01
    )


@pytest.mark.exhaustive
def test_too_little_memory_ends_with_the_plan_and_two_settings(
    data: dict[str, Artifact], tiny_run: Run, tmp_path: Path
) -> None:
    config = tiny_run(engine=EngineConfig(zero_stage=1))
    config = replace(config, train=replace(config.train, micro_batch_size=131_072, global_batch_size=131_072))
    job = TrainingJob(
        run=config,
        directory=tmp_path / "base-0.partial",
        tokens_dir=data["tokens"].path,
        tokenizer_dir=data["tokenizer"].path,
        tokens_digest=data["tokens"].digest,
    )
    job.log_dir.mkdir(parents=True)
    (job.log_dir / "run.json").write_text(to_json(job))
    limit = 6 * 2**30  # of addresses; what the layers keep takes more
    done = subprocess.run(
        [sys.executable, "-u", "-m", "flows.training", str(job.log_dir / "run.json")],  # by hand, not a forked rank
        cwd=CONF_DIR.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    spoken = (job.log_dir / "rank-0.error").read_text()
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "a rank ran out of memory. Planned:" in spoken
    assert "activations 8" in spoken, spoken
    assert "there is 6 GiB for a rank" in spoken
    assert spoken.count("->") == 2
    assert "train.micro_batch_size=65536 -> " in spoken, "the largest that fits"
