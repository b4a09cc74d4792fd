"""What a training run will need, before it starts: parameters, memory per rank, tokens, FLOPs, time, cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flows.config.engine import Precision
from flows.config.hardware import PlanConfig
from flows.config.model import ModelConfig
from flows.config.training import TrainingRun
from flows.model import arithmetic
from flows.model.config_json import counted_shape, read_config
from flows.training.hardware import GIB, Hardware
from flows.training.memory_plan import MemoryPlan, layout_of, plan_memory, update_bytes
from flows.training.trained_weights import trained_weights

FIXED_STEP_S = (5.3e-3, 6.1e-3, 7.4e-3, 15.4e-3)
"""Seconds that a step takes with next to nothing to compute, by ZeRO stage: measured on two CPU cores. A small model
on a fast GPU is held up by its host just so."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one training run is expected to need and to take."""

    parameters: int
    teacher_parameters: int
    """Of the frozen teacher of a distillation; else 0."""
    ranks: int
    steps: int
    tokens: int
    """Tokens trained on, over all ranks and steps."""
    epochs: float | None
    """Passes over the training split; None where its size is not known yet."""
    flops: float
    """Model FLOPs of the whole run, over all ranks; what activation checkpointing computes again does not count."""
    memory: MemoryPlan
    hardware: str
    peak_flops: float
    """FLOP/s of all ranks together, in the run's number format."""
    peak_is_measured: bool
    mfu: float
    """Assumed share of the peak."""
    rank_memory_bytes: float
    """What the hardware has for one rank."""
    step_s: float
    price_per_hour: float | None
    """Of all devices together."""

    @property
    def fits(self) -> bool:
        """Whether a rank's peak is within what the hardware has for it."""
        return self.memory.total_bytes <= self.rank_memory_bytes

    @property
    def tokens_per_s(self) -> float:
        """Expected speed of all ranks together."""
        return self.tokens / self.steps / self.step_s

    @property
    def total_s(self) -> float:
        """Expected time of all steps; evaluation, checkpoints and start-up come on top."""
        return self.steps * self.step_s

    @property
    def cost(self) -> float | None:
        """Expected price of that time; None without a price."""
        return None if self.price_per_hour is None else self.price_per_hour * self.total_s / 3600

    def to_metrics(self) -> dict[str, Any]:
        """JSON values, the derived ones included; prices are left out, which are not the run's."""
        plain = asdict(self)
        plain.pop("price_per_hour")
        plain["memory"] = {**self.memory.components}
        derived = {"memory_bytes": self.memory.total_bytes, "memory_phase": self.memory.phase, "fits": self.fits}
        return plain | derived | {"tokens_per_s": self.tokens_per_s, "total_s": self.total_s}


def make_plan(
    run: TrainingRun,
    vocab_size: int,
    hardware: Hardware,
    assumed: PlanConfig,
    teacher: ModelConfig | None = None,
    train_tokens: int | None = None,
) -> Plan:
    """The plan of one training run.

    Args:
        run: The training run.
        vocab_size: Number of tokens.
        hardware: One GPU for each rank, or one machine for all of them.
        assumed: Share of the peak, and price.
        teacher: The frozen model of a distillation, which computes forward only.
        train_tokens: Size of the training split, where it is known.
    """
    if run.runs_teacher != (teacher is not None):
        raise AssertionError("a run that asks a teacher has one, and no other has")
    run = replace(run, model=counted_shape(run.model))
    ranks = run.launcher.num_ranks
    devices = ranks if hardware.is_gpu else 1
    peak = hardware.peak_flops(run.engine.precision) * devices
    mfu = assumed.mfu or hardware.typical_mfu
    tokens_per_step = run.train.global_batch_size * run.sequence_length
    model_flops = flops_per_token(run, vocab_size, teacher)
    computed_flops = model_flops
    if layout_of(run).activation_checkpointing:
        computed_flops += arithmetic.forward_flops_per_token(counted_shape(run.model), vocab_size, run.sequence_length)
    bandwidth = hardware.bytes_per_s if hardware.is_gpu else hardware.bytes_per_s / ranks
    price = assumed.price_per_device_hour
    return Plan(
        parameters=arithmetic.parameter_count(run.model, vocab_size),
        teacher_parameters=0 if teacher is None else arithmetic.parameter_count(teacher, vocab_size),
        ranks=ranks,
        steps=run.train.max_steps,
        tokens=run.train.max_steps * tokens_per_step,
        epochs=run.train.max_steps * tokens_per_step / train_tokens if train_tokens else None,
        flops=run.train.max_steps * tokens_per_step * model_flops,
        memory=plan_memory(run, vocab_size, hardware.is_gpu, teacher),
        hardware=hardware.name,
        peak_flops=peak,
        peak_is_measured=hardware.measured,
        mfu=mfu,
        rank_memory_bytes=hardware.memory_bytes if hardware.is_gpu else hardware.memory_bytes / ranks,
        step_s=tokens_per_step * computed_flops / (peak * mfu)
        + update_bytes(run, vocab_size) / bandwidth
        + writing_s(run, vocab_size, peak * mfu, bandwidth)
        + FIXED_STEP_S[run.engine.zero_stage],
        price_per_hour=None if price is None else price * devices,
    )


def writing_s(run: TrainingRun, vocab_size: int, flops_per_s: float, bytes_per_s: float) -> float:
    """Seconds that a step takes on average for the student to write text: every token reads all weights anew.

    Args:
        run: The training run; its text is written in `on_policy_share` of the steps.
        vocab_size: Number of tokens.
        flops_per_s: That all ranks reach together.
        bytes_per_s: Of one rank's memory.
    """
    if run.on_policy_share == 0:
        return 0.0
    tokens = run.generation.prompt_tokens + run.generation.new_tokens
    forward = arithmetic.forward_flops_per_token(counted_shape(run.model), vocab_size, tokens)
    width = 4 if run.engine.precision == Precision.fp32 else 2
    read = run.gradient_accumulation_steps * run.generation.new_tokens
    weights = width * arithmetic.parameter_count(counted_shape(run.model), vocab_size)
    computing_s = run.train.global_batch_size * tokens * forward / flops_per_s
    return run.on_policy_share * (computing_s + read * weights / bytes_per_s)


def flops_per_token(run: TrainingRun, vocab_size: int, teacher: ModelConfig | None) -> float:
    """Model FLOPs of one trained token: forward, twice that on the way back, and forward through a teacher.

    A frozen matrix has no gradient of its own, which saves a third of what it takes; what adapters add is left out.
    """
    forward = arithmetic.forward_flops_per_token(counted_shape(run.model), vocab_size, run.sequence_length)
    flops = 3 * forward - 2 * trained_weights(run, vocab_size).frozen_matrices
    if teacher is None:
        return flops
    return flops + arithmetic.forward_flops_per_token(teacher, vocab_size, run.sequence_length)


def teacher_shape(teacher_dir: Path | None) -> ModelConfig | None:
    """The model in a directory, from its config.json alone; None for None."""
    return None if teacher_dir is None else read_config(teacher_dir)[0]


def render_plan(name: str, plan: Plan) -> str:
    """The plan as a compact table for a terminal.

    Args:
        name: What is trained.
        plan: Its plan.
    """
    parts = _large_parts(plan.memory)
    rows = {
        "parameters": f"{plan.parameters:,}"
        + (f", and {plan.teacher_parameters:,} of the teacher" if plan.teacher_parameters else ""),
        "tokens": f"{plan.tokens:,} in {plan.steps:,} steps"
        + ("" if plan.epochs is None else f", {plan.epochs:.3g} epochs"),
        "FLOPs": f"{plan.flops:.3g}",
        "memory": f"{gib(plan.memory.total_bytes)} a rank ({plan.ranks} in all), most at the {plan.memory.phase}; "
        f"{'fits' if plan.fits else 'DOES NOT FIT'} into {gib(plan.rank_memory_bytes)}",
        "": ", ".join(f"{part} {gib(held)}" for part, held in parts),
        "hardware": f"{plan.hardware}: {plan.peak_flops / 1e12:.3g} TFLOP/s "
        f"{'measured' if plan.peak_is_measured else 'by data sheet'}, {plan.mfu:.0%} of it assumed",
        "time": f"{_duration(plan.total_s)}, {_duration(plan.step_s)} a step, {plan.tokens_per_s:,.0f} tokens/s",
    }
    if plan.cost is not None:
        rows["cost"] = f"{plan.cost:.2f} at {plan.price_per_hour:g} an hour"
    return "\n".join([f"plan of {name}", *(f"  {title:<11} {text}" for title, text in rows.items())])


def _large_parts(memory: MemoryPlan) -> list[tuple[str, float]]:
    """Components from the largest down; those below a hundredth of the whole as one."""
    least = memory.total_bytes / 100
    large = sorted(((name, held) for name, held in memory.components.items() if held >= least), key=lambda one: -one[1])
    rest = memory.total_bytes - sum(held for _, held in large)
    return [*large, ("the rest", rest)] if rest >= 1 else large


def gib(num_bytes: float) -> str:
    """A number of bytes in GiB, or MiB below one."""
    return f"{num_bytes / GIB:.3g} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
