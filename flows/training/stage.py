"""Stages `base` and `student`: a training run in ranks of its own, resumable, as an artifact."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flows.artifact import Artifact, digest_file, digest_json
from flows.config import to_json
from flows.config.engine import EngineConfig
from flows.config.hardware import PlanConfig
from flows.config.launcher import LauncherConfig
from flows.config.tracking import TrackingConfig
from flows.config.training import TrainingRun
from flows.data.mixture import open_split
from flows.data.tokenizer import copy_tokenizer
from flows.launcher import RankError, launch_ranks
from flows.training.hardware import this_machine
from flows.training.job import TrainingJob
from flows.training.metrics_log import METRICS, read_metrics
from flows.training.out_of_memory import OutOfMemoryError, explain_out_of_memory, kernel_kills, rank_limit_bytes
from flows.training.plan import make_plan, render_plan, teacher_shape

RUNS = "flows.training.__main__"
"""What the ranks run; part of the code that makes the artifact."""

logger = logging.getLogger(__name__)


def resumable_as(config: TrainingRun) -> TrainingRun:
    """The run with all that leaves its loss curve as it is, but for rounding, set to what a bare run has.

    Ranks and what they share, device, micro batches, logs and the keeping of checkpoints may change while a run goes
    on: its checkpoints serve any of them. Precision and raw DeepSpeed keys decide what is learnt, and micro batches do
    where experts are kept equally busy within each.
    """
    return replace(
        config,
        launcher=LauncherConfig(),
        tracking=TrackingConfig(),
        engine=EngineConfig(precision=config.engine.precision, deepspeed=config.engine.deepspeed),
        train=replace(
            config.train,
            micro_batch_size=config.train.micro_batch_size if config.model.num_experts else 1,
            checkpoint_interval_steps=1,
            keep_checkpoints=1,
            keep_every_steps=0,
            asynchronous_checkpoints=False,
            log_interval_steps=1,
        ),
    )


def fingerprint(config: TrainingRun) -> str | None:
    """Digest of the initial weights, where there are any: other weights under the same path train another model."""
    if config.model.initial_weights is None:
        return None
    files = sorted(path for path in config.model.initial_weights.iterdir() if path.suffix in (".json", ".safetensors"))
    return digest_json({path.name: digest_file(path) for path in files})


def build(directory: Path, config: TrainingRun, parents: Mapping[str, Artifact]) -> dict[str, Any]:
    """Trains the model in `directory`: model.safetensors, config.json, tokenizer.json; logs beside them.

    Args:
        directory: Being made; checkpoints of an interrupted run in it are resumed from.
        config: The run.
        parents: `tokens`, `tokenizer`; for distillation `teacher`, `start` for one that goes on from a candidate,
            `cache` of the teacher where it is read, `validation` tokens where the others were written by the teacher.

    Raises:
        ConfigError: A split is too short for one sequence.
        RankError: A rank failed, died or hung.
        Preempted: The ranks were asked to stop, and have saved.
        OutOfMemoryError: The kernel ended a rank for lack of memory.
    """
    teacher, cache, validation = parents.get("teacher"), parents.get("cache"), parents.get("validation")
    start = teacher if config.student_layers else parents.get("start")
    _check_origins(config, parents)
    _check_splits(config, parents)
    hardware = this_machine(config.engine.device)
    job = TrainingJob(
        run=config,
        directory=directory,
        tokens_dir=parents["tokens"].path,
        tokens_digest=parents["tokens"].digest,
        tokenizer_dir=parents["tokenizer"].path,
        validation_dir=validation.path if validation else None,
        teacher_dir=teacher.path if teacher and config.runs_teacher else None,
        cache_dir=cache.path if cache else None,
        start_dir=start.path if start else None,
        hardware=hardware,
    )
    plan = _plan(job)
    job.log_dir.mkdir(exist_ok=True)
    run_path = job.log_dir / "run.json"
    run_path.write_text(to_json(job))
    with tqdm(total=config.train.max_steps, unit="step", desc=directory.name.partition("-")[0], disable=None) as bar:
        kills = kernel_kills()
        try:
            restarts = launch_ranks(
                RUNS.removesuffix(".__main__"), run_path, config.launcher, job.log_dir, _progress(job, bar)
            )
        except RankError as error:
            if kernel_kills() == kills:
                raise
            raise OutOfMemoryError(f"{error}\nThe kernel ended a process meanwhile: {_explain(job)}") from error
    for path in job.best_dir.glob("[!.]*"):  # a killed rank may have left part of a file under a hidden name
        path.replace(directory / path.name)
    copy_tokenizer(job.tokenizer_dir, directory)
    shutil.rmtree(job.checkpoint_dir)
    for heartbeat in job.log_dir.glob("*.heartbeat"):
        heartbeat.unlink()
    summary: dict[str, Any] = json.loads((job.log_dir / "summary.json").read_text())
    return summary | {"curve": list(read_metrics(job.log_dir / METRICS)), "plan": plan, "restarts": restarts}


def _check_origins(config: TrainingRun, parents: Mapping[str, Artifact]) -> None:
    """Raises `RunError` where a model or cache that training begins with is of other tokens than this run's."""
    from flows.training.teacher_cache import require_cache_of, require_same_tokenizer  # torch: a skipped run needs none

    for role in ("teacher", "start"):
        if role in parents:
            require_same_tokenizer(parents[role].path, parents["tokenizer"].path, role)
    if config.cache_top_k:
        require_cache_of(parents["cache"], parents["teacher"], parents["tokens"], parents["tokenizer"])


def _check_splits(config: TrainingRun, parents: Mapping[str, Artifact]) -> None:
    """Opens the test split, too: what cannot be measured is not trained first."""
    held_out = parents.get("validation", parents["tokens"])
    for split, tokens in {"train": parents["tokens"], "validation": held_out, "test": held_out}.items():
        open_split(tokens.path, split, config.sequence_length, config.document_masks, config.mixture)


def _plan(job: TrainingJob) -> dict[str, Any] | None:
    """Logs the plan of the run on this machine; its numbers, or None where the machine's peak is not known."""
    if job.hardware is None:
        logger.info("no plan: this machine's GPU is not in the table of flows/training/hardware.py")
        return None
    index = json.loads((job.tokens_dir / "index.json").read_text())
    plan = make_plan(
        job.run,
        index["vocab_size"],
        job.hardware,
        PlanConfig(),
        teacher_shape(job.teacher_dir),
        index["splits"]["train"]["tokens"],
    )
    logger.info("%s", render_plan(job.name.partition("-")[0], plan))
    return plan.to_metrics()


def _explain(job: TrainingJob) -> str:
    vocab_size = json.loads((job.tokens_dir / "index.json").read_text())["vocab_size"]
    limit = rank_limit_bytes(job.run.launcher.num_ranks)
    return explain_out_of_memory(job.run, vocab_size, False, teacher_shape(job.teacher_dir), limit)


def _progress(job: TrainingJob, bar: tqdm[Any]) -> Callable[[], None]:
    """Follows the leader's metrics.jsonl: draws the bar in a terminal, logs lines elsewhere."""
    path = job.log_dir / METRICS
    seen = path.stat().st_size if path.exists() else 0

    def show() -> None:
        nonlocal seen
        if not path.exists() or path.stat().st_size == seen:
            return
        seen = path.stat().st_size
        events = list(read_metrics(path))
        training = [event for event in events if "train_loss" in event]
        validation = [event["validation_loss"] for event in events if "validation_loss" in event]
        if not training:
            return
        last = training[-1]
        bar.update(last["step"] - bar.n)
        shown = {"loss": f"{last['train_loss']:.3f}", "tokens/s": f"{last['tokens_per_s']:.0f}"}
        if validation:
            shown["validation"] = f"{validation[-1]:.3f}"
        bar.set_postfix(shown)
        if not bar.disable:  # a terminal sees the bar
            return
        logger.info(
            "step %d of %d: %s", last["step"], job.run.train.max_steps, ", ".join(f"{k} {v}" for k, v in shown.items())
        )

    return show
