"""The training loop: one for every objective and every way to share work among ranks."""

from __future__ import annotations

import json
import math
import os
import time

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from flows.artifact import write_json_atomically
from flows.config.model import Kernels
from flows.config.training import Objective, TrainConfig, TrainingRun
from flows.data.packed import PackedDataset
from flows.launcher import Heartbeat
from flows.model.checkpoint import load_decoder, load_initial_weights, save_decoder
from flows.model.decoder import Decoder, initialize
from flows.training.batches import IGNORED, micro_batches, validation_batches
from flows.training.checkpoint import TrainingState, load_newest_checkpoint, save_checkpoint
from flows.training.engine import (
    NonFiniteLossError,
    build_engine,
    close_engine,
    gather_weights,
    set_learning_rate,
    start_process_group,
    train_step,
    validation_loss,
)
from flows.training.job import TrainingJob
from flows.training.metrics_log import MetricsLog
from flows.training.objectives import Loss, LossModule, cross_entropy, distillation
from flows.training.schedules import learning_rate
from flows.training.sequence_parallel import share_sequences


def train(job: TrainingJob) -> None:
    """Trains one model on all ranks, from the newest checkpoint if there is one; writes the best weights.

    Raises:
        NonFiniteLossError: On every rank, before the optimizer step; checkpoints stay as they are.
    """
    run = job.run
    start_process_group()
    heartbeat = Heartbeat(job.log_dir)
    heartbeat.beat()
    index = json.loads((job.tokens_dir / "index.json").read_text())
    dataset = PackedDataset(job.tokens_dir, "train", run.sequence_length)
    validation = PackedDataset(job.tokens_dir, "validation", run.sequence_length)
    model = _initial_model(run, index["vocab_size"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = build_engine(LossModule(model, _loss(job)), run)
    state = load_newest_checkpoint(engine, job.checkpoint_dir)
    first_step = state.step
    leader = dist.get_rank() == 0
    log = MetricsLog(job.log_dir, state.step, run.tracking.tensorboard) if leader else None
    tokens_per_step = run.train.global_batch_size * run.sequence_length
    started, since = time.monotonic(), state.step
    while not _finished(state, run.train):
        rate = learning_rate(run.train, state.step)
        set_learning_rate(engine, rate)
        loss = train_step(engine, micro_batches(dataset, run, state.step, engine.device), state.step)
        state.step += 1
        heartbeat.beat()
        if log and (state.step % run.train.log_interval_steps == 0 or state.step == run.train.max_steps):
            speed = tokens_per_step * (state.step - since) / (time.monotonic() - started)
            norm = engine.get_global_grad_norm()
            measured = {} if norm is None else {"grad_norm": float(norm)}
            log.write(state.step, train_loss=loss, learning_rate=rate, tokens_per_s=round(speed, 1), **measured)
        if _due(state.step, run.train.eval_interval_steps, run.train):
            paused = time.monotonic()
            _evaluate_and_keep_best(engine, validation, job, state, log, index, heartbeat)
            started += time.monotonic() - paused  # speed is of training alone
        if log and state.step % run.train.log_interval_steps == 0:
            started, since = time.monotonic(), state.step
        if _due(state.step, run.train.checkpoint_interval_steps, run.train):
            save_checkpoint(engine, job.checkpoint_dir, state, run.train.keep_checkpoints)
    if leader:
        write_json_atomically(
            job.log_dir / "summary.json",
            {
                "steps": state.step,
                "resumed_from_step": first_step,
                "stopped_early": state.step < run.train.max_steps,
                "best_validation_loss": state.best_loss,
                "parameters": parameters,
                "train_tokens": state.step * tokens_per_step,
                "epochs": round(state.step * run.train.global_batch_size / len(dataset), 3),
            },
        )
    close_engine(engine)


def evaluate(engine: DeepSpeedEngine, dataset: PackedDataset, run: TrainingRun, heartbeat: Heartbeat) -> float:
    """Validation cross-entropy in nats per token, over the same first `eval_tokens` tokens each time."""
    count = min(len(dataset), max(1, run.train.eval_tokens // run.sequence_length))
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in validation_batches(dataset, count, run, engine.device):
        loss = validation_loss(engine, batch)
        if loss is not None:
            sums += torch.tensor([loss, float((batch.targets_BL != IGNORED).sum())], dtype=torch.float64)
        heartbeat.beat()
    sums = sums.to(engine.device)
    dist.all_reduce(sums)
    mean = float(sums[0] / sums[1])
    if not math.isfinite(mean):
        raise NonFiniteLossError(f"the validation loss is {mean}; set a lower train.optimizer.learning_rate.")
    return mean


def _evaluate_and_keep_best(
    engine: DeepSpeedEngine,
    validation: PackedDataset,
    job: TrainingJob,
    state: TrainingState,
    log: MetricsLog | None,
    index: dict[str, int],
    heartbeat: Heartbeat,
) -> None:
    loss = evaluate(engine, validation, job.run, heartbeat)
    if log:
        log.write(state.step, validation_loss=loss)
    state.evals_without_improvement += 1
    if loss < state.best_loss:
        state.best_loss, state.evals_without_improvement = loss, 0
        weights = gather_weights(engine)
        if weights:
            job.best_dir.mkdir(parents=True, exist_ok=True)
            save_decoder(
                job.best_dir,
                weights,
                job.run.model,
                index["vocab_size"],
                job.run.sequence_length,
                index["eos_token_id"],
            )


def _initial_model(run: TrainingRun, vocab_size: int) -> Decoder:
    model = Decoder(run.model, vocab_size)
    if run.model.initial_weights is None:
        initialize(model, run.seed)
    else:
        load_initial_weights(model, run.model.initial_weights, run.model_section)
    return model


def _loss(job: TrainingJob) -> Loss:
    match job.run.objective:
        case Objective.cross_entropy:
            return cross_entropy
        case Objective.distillation:
            if job.teacher_dir is None:
                raise AssertionError("a distillation job without a teacher")
            teacher = load_decoder(job.teacher_dir, Kernels.auto)
            if os.environ["DS_ACCELERATOR"] == "cuda":
                teacher = teacher.to(torch.device("cuda", int(os.environ["LOCAL_RANK"])))
            share_sequences(teacher, job.run)
            return distillation(teacher, job.run.temperature, job.run.alpha)


def _due(step: int, interval: int, config: TrainConfig) -> bool:
    return step % interval == 0 or step == config.max_steps


def _finished(state: TrainingState, config: TrainConfig) -> bool:
    stopped = 0 < config.early_stopping_evals <= state.evals_without_improvement
    return stopped or state.step >= config.max_steps
