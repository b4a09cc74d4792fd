"""Out of memory: what was planned, and the two settings that cost least speed to change."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flows.config import ConfigError, RunError
from flows.config.engine import Precision
from flows.config.model import ModelConfig
from flows.config.training import Objective, TrainingRun
from flows.training.hardware import usable_memory_bytes
from flows.training.memory_plan import plan_memory
from flows.training.plan import gib

Change = Callable[[], TrainingRun]
SHOWN = 2
WORTH_IT = 0.99
"""A change that leaves more than this share of the memory is not worth naming."""


class OutOfMemoryError(RunError):
    """A rank needed more memory than there is."""


@dataclass(frozen=True)
class Remedy:
    """A setting to change."""

    setting: str
    """As typed on the command line."""
    memory_bytes: float
    """Planned for a rank, with it."""
    slowdown: float
    """Extra time as a share, assumed; negative = faster."""
    note: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the GPU or on the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without its import
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "Cannot allocate memory" in text)


def explain_out_of_memory(
    run: TrainingRun, vocab_size: int, is_gpu: bool, teacher: ModelConfig | None, limit_bytes: float
) -> str:
    """What the user is told.

    Args:
        run: The run that failed.
        vocab_size: Number of tokens.
        is_gpu: Which memory ran out.
        teacher: The frozen model of a distillation.
        limit_bytes: What a rank may use.
    """
    plan = plan_memory(run, vocab_size, is_gpu, teacher)
    parts = sorted(plan.components.items(), key=lambda part: -part[1])
    said = [
        f"a rank ran out of memory. Planned: {gib(plan.total_bytes)} at the {plan.phase} "
        f"({', '.join(f'{name} {gib(held)}' for name, held in parts)}); there is {gib(limit_bytes)} for a rank."
    ]
    best: dict[str, Remedy] = {}
    for one in sorted(remedies(run, vocab_size, is_gpu, teacher), key=lambda one: one.slowdown):
        field = one.setting.partition("=")[0]
        if field not in best or best[field].memory_bytes > limit_bytes:  # the least change of a setting that is enough
            best[field] = one
    found = sorted(best.values(), key=lambda one: (one.memory_bytes > limit_bytes, one.slowdown))[:SHOWN]
    if found:
        said.append("What costs least speed to change:")
    for one in found:
        enough = "" if one.memory_bytes <= limit_bytes else "; not enough alone"
        said.append(f"  {one.setting} -> {gib(one.memory_bytes)}, {one.note}{enough}")
    return "\n".join(said)


def remedies(run: TrainingRun, vocab_size: int, is_gpu: bool, teacher: ModelConfig | None) -> list[Remedy]:
    """Changes of one setting that save memory, as planned."""
    before = plan_memory(run, vocab_size, is_gpu, teacher).total_bytes
    found = []
    for setting, change, slowdown, note in _changes(run):
        try:
            after = plan_memory(change(), vocab_size, is_gpu, teacher).total_bytes
        except ConfigError:  # not together with the run's other settings
            continue
        if after <= WORTH_IT * before:
            found.append(Remedy(setting, after, slowdown, note))
    return found


def _changes(run: TrainingRun) -> Iterator[tuple[str, Change, float, str]]:
    """Settings with what makes them; how much slower is what their sources say, or an assumption."""
    section = "distill.train" if run.objective == Objective.distillation else "train"
    size, stage = run.train.micro_batch_size, run.engine.zero_stage
    while size > 1 and size % 2 == 0:
        size //= 2
        halvings = run.train.micro_batch_size // size
        changed = partial(_with_train, run, micro_batch_size=size)
        slowdown = 0.03 * halvings / 2
        yield f"{section}.micro_batch_size={size}", changed, slowdown, "a few per cent slower, the same result"
    if run.launcher.num_ranks > 1:
        for higher in range(stage + 1, 4):
            changed = partial(_with_engine, run, zero_stage=higher)
            # ZeRO 1 and 2 communicate as much as plain data parallelism, ZeRO-3 1.5 x (arXiv:1910.02054, section 7).
            slowdown, note = (0.02, "about as fast") if higher < 3 else (0.15, "half as much communication again")
            yield f"engine.zero_stage={higher}", changed, slowdown, note
    if run.engine.zero_stage > 0 and "zero_optimization" not in run.engine.deepspeed:
        keys = {"zero_optimization": {"reduce_bucket_size": 50_000_000}}
        changed = partial(_with_engine, run, deepspeed={**run.engine.deepspeed, **keys})
        setting = "+engine.deepspeed.zero_optimization.reduce_bucket_size=50000000"
        yield setting, changed, 0.02, "about as fast: messages of 50 M numbers"
    if run.engine.precision == Precision.fp32 and run.engine.zero_stage > 0:  # DeepSpeed has no bf16 without ZeRO
        changed = partial(_with_engine, run, precision=Precision.bf16)
        yield "engine.precision=bf16", changed, 0.05, "usually faster, rounded to 8 bits"
    if not run.engine.activation_checkpointing:
        changed = partial(_with_engine, run, activation_checkpointing=True)
        yield "engine.activation_checkpointing=true", changed, 0.33, "a third slower, the same result"
    if run.sequence_length >= 16:
        half = run.sequence_length // 2
        yield f"data.sequence_length={half}", partial(replace, run, sequence_length=half), 1.0, "a shorter context"


def _with_train(run: TrainingRun, **settings: Any) -> TrainingRun:
    return replace(run, train=replace(run.train, **settings))


def _with_engine(run: TrainingRun, **settings: Any) -> TrainingRun:
    return replace(run, engine=replace(run.engine, **settings))


def rank_limit_bytes(ranks: int) -> float:
    """Memory of this machine that one of its ranks may use: an even share, or this process's own limit."""
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    share = usable_memory_bytes() / ranks
    return share if own == resource.RLIM_INFINITY else min(own, share)


def kernel_kills(events: Path = Path("/sys/fs/cgroup/memory.events"), machine: Path = Path("/proc/vmstat")) -> int:
    """How many processes the kernel has killed for lack of memory so far: of our cgroup, or else of the machine."""
    path = events if events.exists() else machine
    counts = dict(line.split() for line in path.read_text().splitlines()) if path.exists() else {}
    return int(counts.get("oom_kill", 0))
