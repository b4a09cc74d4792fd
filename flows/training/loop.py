"""The training loop: one for every objective and ZeRO stage."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from flows.artifact import write_json_atomically
from flows.config import RunError
from flows.config.model import Kernels
from flows.config.training import Objective, TrainConfig, TrainingRun
from flows.data.packed import PackedDataset
from flows.launcher import Heartbeat
from flows.model.checkpoint import load_decoder, load_initial_model
from flows.model.decoder import Decoder, initialize
from flows.model.transformers_model import named_weights_module
from flows.training.batches import Batch, micro_batches, to_batch
from flows.training.checkpoint import TrainingState, load_newest_checkpoint, save_checkpoint
from flows.training.engine import build_engine, close_engine, gather_weights, set_learning_rate, start_process_group
from flows.training.job import TrainingJob
from flows.training.metrics_log import MetricsLog
from flows.training.objectives import Loss, LossModule, cross_entropy, distillation
from flows.training.saving import save_trained
from flows.training.schedules import ema_decay, learning_rate
from flows.training.trainable import choose_weights, count_weights
from flows.training.weight_average import averaged_weights, set_ema_decay


class NonFiniteLossError(RunError):
    """The loss is NaN or infinite; the optimizer step was not taken."""


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
    engine = build_engine(LossModule(_initial_model(run, index["vocab_size"]), _loss(job)), run)
    state = load_newest_checkpoint(engine, job.checkpoint_dir)
    first_step = state.step
    leader = dist.get_rank() == 0
    log = MetricsLog(job.log_dir, state.step, run.tracking.tensorboard) if leader else None
    tokens_per_step = run.train.global_batch_size * run.sequence_length
    started, since = time.monotonic(), state.step
    while not _finished(state, run.train):
        rate = learning_rate(run.train, state.step)
        set_learning_rate(engine, rate)
        set_ema_decay(engine, ema_decay(run.train, state.step))
        torch.manual_seed(hash((run.seed, state.step, dist.get_rank())))  # a resumed run drops what others would
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
            with averaged_weights(engine, run.train.ema_decay > 0):
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
                **count_weights(engine.module),
                "train_tokens": state.step * tokens_per_step,
                "epochs": round(state.step * run.train.global_batch_size / len(dataset), 3),
            },
        )
    close_engine(engine)


def train_step(engine: DeepSpeedEngine, batches: Iterator[Batch], step: int) -> float:
    """Runs one optimizer update on this rank's micro batches; the mean loss over all ranks, in nats per token.

    Raises:
        NonFiniteLossError: On every rank alike, before the update.
    """
    total = torch.zeros((), device=engine.device)
    accumulation: int = engine.gradient_accumulation_steps()
    for micro_step, batch in enumerate(batches, start=1):
        loss = engine(*batch)
        engine.backward(loss)
        total += loss.detach().float()
        if micro_step == accumulation:
            dist.all_reduce(total)
            mean = float(total) / (accumulation * dist.get_world_size())
            if not math.isfinite(mean):
                raise NonFiniteLossError(
                    f"the training loss is {mean} at step {step + 1}; the optimizer step was not taken and checkpoints "
                    f"stay as they are. Set a lower train.optimizer.learning_rate, a longer train.warmup_steps or a "
                    f"train.gradient_clipping above 0, or look at the data of this step."
                )
        engine.step()
    return mean


def evaluate(engine: DeepSpeedEngine, dataset: PackedDataset, run: TrainingRun, heartbeat: Heartbeat) -> float:
    """Validation cross-entropy in nats per token, over the same first `eval_tokens` tokens each time."""
    count = min(len(dataset), max(1, run.train.eval_tokens // run.sequence_length))
    size, ranks, rank = run.train.micro_batch_size, dist.get_world_size(), dist.get_rank()
    sums = torch.zeros(2, dtype=torch.float64)
    engine.eval()
    with torch.no_grad():
        for first in range(0, count, size * ranks):
            mine = range(first + rank * size, min(first + (rank + 1) * size, count))
            # A rank left without sequences runs one that does not count: ZeRO-3 gathers weights with all ranks.
            batch = to_batch([dataset[i] for i in mine] or [dataset[0]], engine.device)
            mean = float(engine(*batch))
            if mine:
                sums += torch.tensor([mean, 1.0], dtype=torch.float64) * float(batch.loss_tokens)
            heartbeat.beat()
    engine.train()
    sums = sums.to(engine.device)
    dist.all_reduce(sums)
    loss = float(sums[0] / sums[1])
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the validation loss is {loss}; set a lower train.optimizer.learning_rate.")
    return loss


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
        weights = gather_weights(named_weights_module(engine.module.model))
        if weights:
            save_trained(job, engine.module.model, weights, index)


def _initial_model(run: TrainingRun, vocab_size: int) -> nn.Module:
    model: nn.Module
    if run.model.initial_weights is None:
        model = Decoder(run.model, vocab_size)
        initialize(model, run.seed)
    else:
        model = load_initial_model(run.model, vocab_size, run.model_section)
    choose_weights(named_weights_module(model), run.train, run.seed)
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
            return distillation(teacher, job.run.temperature, job.run.alpha)


def _due(step: int, interval: int, config: TrainConfig) -> bool:
    return step % interval == 0 or step == config.max_steps


def _finished(state: TrainingState, config: TrainConfig) -> bool:
    stopped = 0 < config.early_stopping_evals <= state.evals_without_improvement
    return stopped or state.step >= config.max_steps
