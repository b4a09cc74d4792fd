"""Plans: what fits, what sharing saves, what to change when memory runs out, on named hardware and here."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flows.compose import CONF_DIR, compose_config
from flows.config import ConfigError
from flows.config.distillation import GenerationConfig, HiddenConfig, RelationsConfig, TextRun
from flows.config.engine import EngineConfig, Precision
from flows.config.hardware import HardwareName, PlanConfig
from flows.config.launcher import LauncherConfig
from flows.config.lora import LoraConfig
from flows.config.model import ModelConfig
from flows.config.training import Objective, TrainConfig, TrainingRun
from flows.model.arithmetic import weight_shapes
from flows.model.decoder import Decoder
from flows.training.hardware import TABLE, find_hardware, measure_processor, usable_memory_bytes
from flows.training.lesson_plan import plan_cache, plan_text
from flows.training.lora import add_adapters
from flows.training.memory_plan import plan_memory
from flows.training.out_of_memory import explain_out_of_memory, is_out_of_memory, kernel_kills, remedies
from flows.training.plan import make_plan, render_plan
from flows.training.record_layout import RecordLayout

Run = Callable[..., TrainingRun]
SEVEN_B = ModelConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    tie_word_embeddings=False,
)


def seven_b(base: TrainingRun, zero_stage: int, ranks: int) -> TrainingRun:
    engine = EngineConfig(zero_stage=zero_stage, precision=Precision.bf16)
    train = TrainConfig(micro_batch_size=1, global_batch_size=64)
    launcher = LauncherConfig(num_ranks=ranks)
    return replace(base, model=SEVEN_B, engine=engine, train=train, launcher=launcher, sequence_length=2048)


@pytest.mark.parametrize(("zero_stage", "bytes_per_parameter"), [(1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)])
def test_states_are_those_of_the_zero_paper(zero_stage: int, bytes_per_parameter: float, tiny_run: Run) -> None:
    """arXiv:1910.02054, figure 1: K = 12 bytes of optimizer state and masters for each parameter, over 64 ranks."""
    run = seven_b(tiny_run(), zero_stage, 64)
    components = plan_memory(run, 32_000, True).components
    parameters = make_plan(run, 32_000, TABLE[HardwareName.h100], PlanConfig()).parameters
    assert 6.7e9 < parameters < 6.8e9
    names = ("weights", "gradients", "fp32 masters", "optimizer states")
    gathered = 2 * 1e9 if zero_stage == 3 else 0  # whole weights that DeepSpeed keeps for the layers at work
    assert sum(components[name] for name in names) - gathered == pytest.approx(bytes_per_parameter * parameters)


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, Precision.fp32), (1, Precision.bf16), (2, Precision.bf16)])
def test_experts_are_shared_and_their_states_cut_over_those_that_hold_the_same(
    zero_stage: int, precision: Precision, tiny_run: Run
) -> None:
    base = tiny_run(ranks=4, micro_batch_size=2, gradient_clipping=0.0)
    run = replace(
        base,
        model=replace(base.model, num_experts=4),
        engine=EngineConfig(zero_stage=zero_stage, precision=precision, expert_parallel_size=2),
    )
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(run.model, 64).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    dense = sum(sizes.values()) - experts
    width = 4 if precision == Precision.fp32 else 2
    components = plan_memory(run, 64, False).components
    assert components["weights"] == pytest.approx(width * (dense + experts / 2))
    states = dense / 4 + experts / 2 / 2 if zero_stage else dense + experts / 2
    assert components["optimizer states"] == pytest.approx(2 * 4 * states)
    assert components.get("fp32 masters", 0) == pytest.approx(4 * states if zero_stage else 0)
    gradients = states if zero_stage == 2 else dense + experts / 2
    in_step = 4 * states if zero_stage and plan_memory(run, 64, False).phase == "optimizer step" else 0
    assert components["gradients"] == pytest.approx(width * gradients + in_step)


def test_adapters_alone_have_gradients_and_states(tiny_run: Run) -> None:
    run = tiny_run()
    model = replace(run.model, initial_weights=Path("somewhere"))
    adapted = replace(run, model=model, train=replace(run.train, lora=LoraConfig(rank=4)))
    decoder = Decoder(model, 64)
    add_adapters(decoder, adapted.train.lora, seed=0)
    trained = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    assert plan_memory(adapted, 64, False).components["optimizer states"] == 8 * trained


def test_seven_billion_parameters_fit_on_gpus_that_share_and_not_on_one(tiny_run: Run) -> None:
    h100 = TABLE[HardwareName.h100]
    assert not make_plan(seven_b(tiny_run(), 1, 1), 32_000, h100, PlanConfig()).fits
    shared = make_plan(seven_b(tiny_run(), 2, 8), 32_000, h100, PlanConfig(price_per_device_hour=2.0))
    assert shared.fits
    assert shared.price_per_hour == 16
    assert shared.cost == pytest.approx(16 * shared.total_s / 3600)
    tokens_per_s = 0.4 * 8 * 989.4e12 / (6 * (shared.parameters - 32_000 * 4096) + 12 * 32 * 2048 * 4096)
    assert shared.tokens_per_s == pytest.approx(tokens_per_s, rel=0.02)  # and the update, which takes 1 % of a step
    assert "fits into 80 GiB" in render_plan("base", shared)
    assert "cost" not in render_plan("base", replace(shared, price_per_hour=None))


def test_what_to_change_is_ordered_by_speed_and_computed(tiny_run: Run) -> None:
    run = replace(tiny_run(ranks=2), engine=EngineConfig(zero_stage=0))
    found = {one.setting: one.memory_bytes for one in remedies(run, 50_000, False, None)}
    assert {"train.micro_batch_size=2", "train.micro_batch_size=1"} < set(found)
    halved = replace(run, train=replace(run.train, micro_batch_size=2))
    assert found["train.micro_batch_size=2"] == plan_memory(halved, 50_000, False).total_bytes
    enough_for_half = explain_out_of_memory(run, 50_000, False, None, found["train.micro_batch_size=2"])
    assert "train.micro_batch_size=2 ->" in enough_for_half
    assert enough_for_half.count("->") == 2
    limit = (found["train.micro_batch_size=2"] + found["train.micro_batch_size=1"]) / 2
    first, second = explain_out_of_memory(run, 50_000, False, None, limit).splitlines()[2:]
    assert "train.micro_batch_size=1 ->" in first, "halving once would run out of memory again"
    assert second.endswith("; not enough alone"), "and what is no help by itself says so"


def test_out_of_memory_is_told_from_other_faults() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory") as cpu:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(cpu.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_kernel_kills_are_read_from_the_cgroup_or_else_the_machine(tmp_path: Path) -> None:
    events, machine = tmp_path / "memory.events", tmp_path / "vmstat"
    assert kernel_kills(events, machine) == 0
    machine.write_text("pgfault 12\noom_kill 3\n")
    assert kernel_kills(events, machine) == 3
    events.write_text("low 0\noom 2\noom_kill 1\n")
    assert kernel_kills(events, machine) == 1
    assert kernel_kills() >= 0


def test_this_machine_is_measured_and_limits_of_containers_count(tmp_path: Path) -> None:
    processor = measure_processor()
    assert 1e9 < processor.fp32_flops < 1e14
    assert 1e8 < processor.bytes_per_s < 1e13
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert usable_memory_bytes(tmp_path) == 2**30
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory_bytes(tmp_path) == processor.memory_bytes


def test_a_gpu_that_is_not_in_the_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    device = EngineConfig().device
    for name, known in (("NVIDIA L4", True), ("NVIDIA T1000", False)):
        tool.write_text(f"#!/bin/sh\necho '{name}'\n")
        tool.chmod(0o755)
        if known:
            assert find_hardware(HardwareName.auto, device) is TABLE[HardwareName.l4]
        else:
            with pytest.raises(ConfigError, match=r"finds the GPU 'NVIDIA T1000'.* Set plan.hardware to one of h200"):
                find_hardware(HardwareName.auto, device)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.mfu=1.5", "plan.mfu=1.5 must lie above 0 and up to 1"),
        ("plan.price_per_device_hour=-1", "must not be negative"),
        ("tracking.profile_steps=[4]", r"tracking.profile_steps=\[4\] must be \[\] or \[start, stop\]"),
        ("tracking.mlflow_uri=http://x", "is given while tracking.mlflow=false"),
        ("tracking.project=' '", "tracking.project=.* must not be empty"),
    ],
)
def test_mistakes_are_answered(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config([override])


def test_the_command_plans_base_and_student_without_torch(tmp_path: Path) -> None:
    words = ["+experiment=quickstart", "plan.hardware=l4", "plan.price_per_device_hour=0.8"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows.plan", *words, f"artifacts_dir={tmp_path}"],
        cwd=CONF_DIR.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    print(f"answered in {time.monotonic() - started:.1f} s")
    assert done.stdout.startswith("plan of base\n  parameters  4,000,000\n")
    assert "plan of student" in done.stdout
    assert "NVIDIA L4" in done.stdout
    assert "cost" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in loaded
    assert not loaded & {"torch", "deepspeed", "prefect"}
    assert not list(tmp_path.iterdir())


def test_what_teachers_leave_and_students_write_is_counted(tiny_run: Run) -> None:
    h100, base = TABLE[HardwareName.h100], tiny_run()
    layout = RecordLayout(64, 4096)
    assert layout.record_bytes == 64 * 12 // 8 + 64 * 2 + 4 * 2
    cache = plan_cache(SEVEN_B, layout, 10**6, 2048, h100)
    assert cache.num_bytes == 232 * 10**6
    assert cache.seconds is not None
    assert cache.seconds > 2 * 6.5e9 * 10**6 / h100.fp32_flops
    assert plan_cache(SEVEN_B, layout, 10**6, 2048, None).in_words().endswith("time is not known on this GPU")
    writing = GenerationConfig(prompt_tokens=100, new_tokens=100)
    text = TextRun(sequences=640, generation=writing, sequence_length=512, seed=0)
    half = plan_text(SEVEN_B, 4096, replace(text, sequences=320), h100)
    planned = plan_text(SEVEN_B, 4096, text, h100)
    assert planned.tokens == 640 * 200
    assert planned.seconds == pytest.approx(2 * half.seconds)  # type: ignore[operator]
    assert planned.seconds > 1000 * 4 * 6e9 / h100.bytes_per_s  # type: ignore[operator]
    distilled = replace(base, objective=Objective.distillation, alpha=0.5)
    own = replace(distilled, on_policy_share=0.5, generation=writing, sequence_length=512)
    steps = [make_plan(run, 4096, h100, PlanConfig(), SEVEN_B).step_s for run in (replace(own, on_policy_share=0), own)]
    assert steps[1] > steps[0]
    hidden = replace(distilled, hidden=HiddenConfig(weight=1.0), relations=RelationsConfig(weight=1.0))
    assert plan_memory(hidden, 4096, False, SEVEN_B).components["features"] > 0
    assert "features" not in plan_memory(distilled, 4096, False, SEVEN_B).components
    cached = make_plan(replace(distilled, cache_top_k=8), 4096, h100, PlanConfig())
    assert cached.teacher_parameters == 0
