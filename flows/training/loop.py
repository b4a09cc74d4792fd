"""The training loop: one for every objective and ZeRO stage."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from flows.artifact import write_json_atomically
from flows.config import RunError, flat_settings
from flows.config.model import Kernels
from flows.config.training import Objective, TrainConfig, TrainingRun
from flows.data.mixture import epochs, open_split
from flows.data.packed import Sequences
from flows.launcher import Heartbeat
from flows.model.checkpoint import load_decoder, load_initial_weights
from flows.model.decoder import Decoder, initialize
from flows.training.batches import Batch, micro_batches, to_batch
from flows.training.checkpoint import Checkpoints, TrainingState
from flows.training.consolidation import consolidate
from flows.training.engine import build_engine, close_engine, set_learning_rate, start_process_group
from flows.training.job import TrainingJob
from flows.training.metrics_log import MetricsLog
from flows.training.objectives import Loss, LossModule, cross_entropy, distillation
from flows.training.plan import flops_per_token, teacher_shape
from flows.training.receipts import ReceiptLog, first_link, next_link
from flows.training.saving import save_trained
from flows.training.schedules import ema_decay, learning_rate
from flows.training.step_meter import StepMeter
from flows.training.step_profile import StepProfile
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
    dataset = open_split(job.tokens_dir, "train", run.sequence_length, run.document_masks, run.mixture)
    validation = open_split(job.tokens_dir, "validation", run.sequence_length, run.document_masks, run.mixture)
    engine = build_engine(LossModule(_initial_model(run, index["vocab_size"]), _loss(job)), run)
    checkpoints = Checkpoints(job.checkpoint_dir, engine, dict(engine.module.model.named_parameters()), run.train)
    state = checkpoints.load()
    first_step = state.step
    leader = dist.get_rank() == 0
    log = MetricsLog(job.log_dir, state.step, run.tracking, job.name, flat_settings(run)) if leader else None
    receipts = ReceiptLog(job.log_dir, state.step, run.train.max_steps) if leader else None
    state.receipt = state.receipt or first_link(job.tokens_digest, run.sequence_length)
    tokens_per_step = run.train.global_batch_size * run.sequence_length
    flops = flops_per_token(run, index["vocab_size"], teacher_shape(job.teacher_dir))
    meter = StepMeter(engine.device, tokens_per_step, flops, _peak_flops(job, engine.device))
    profile = StepProfile(run.tracking, job.log_dir, engine.device)
    while not _finished(state, run.train):
        rate = learning_rate(run.train, state.step)
        set_learning_rate(engine, rate)
        set_ema_decay(engine, ema_decay(run.train, state.step))
        if run.train.lora.dropout:
            torch.manual_seed(hash((run.seed, state.step, dist.get_rank())))  # resumed runs drop what others would
        with checkpoints.finished_on_error(), meter.step(), profile.step(state.step):
            with meter.loading():
                batches = micro_batches(dataset, run, state.step, engine.device)
            loss = train_step(engine, batches, state.step)
        state.step += 1
        state.receipt = next_link(state.receipt, state.step, batches.sample_ids)
        state.loss_tokens += batches.loss_tokens
        if receipts:
            receipts.write(state.step, state.receipt)
        heartbeat.beat()
        if _due(state.step, run.train.log_interval_steps, run.train):
            measured = meter.collect()
            norm = engine.get_global_grad_norm()
            if norm is not None:
                measured["grad_norm"] = float(norm)
            if log:
                log.write(state.step, train_loss=loss, learning_rate=rate, **measured)
        if _due(state.step, run.train.eval_interval_steps, run.train):
            with checkpoints.finished_on_error(), averaged_weights(engine, run.train.ema_decay > 0):
                _evaluate_and_keep_best(engine, validation, job, state, log, index, heartbeat)
        if _due(state.step, run.train.checkpoint_interval_steps, run.train):
            checkpoints.save(state)
    checkpoints.wait()
    if log and receipts:
        log.close()
        receipts.write(state.step, state.receipt, last=True)
        write_json_atomically(
            job.log_dir / "summary.json",
            {
                "steps": state.step,
                "resumed_from_step": first_step,
                "layouts": state.layouts,
                "stopped_early": state.step < run.train.max_steps,
                "best_validation_loss": state.best_loss,
                **count_weights(engine.module),
                "train_tokens": state.step * tokens_per_step,
                "loss_tokens": state.loss_tokens,
                "epochs": round(state.step * run.train.global_batch_size / len(dataset), 3),
                "epochs_by_corpus": epochs(dataset, state.step * run.train.global_batch_size),
                "receipt": state.receipt,
                "measured": meter.summary(),
            },
        )
    close_engine(engine)


def train_step(engine: DeepSpeedEngine, batches: Iterable[Batch], step: int) -> float:
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


def evaluate(engine: DeepSpeedEngine, dataset: Sequences, run: TrainingRun, heartbeat: Heartbeat) -> float:
    """Validation cross-entropy in nats per token, over the same first `eval_tokens` tokens each time."""
    chosen = dataset.first(max(1, run.train.eval_tokens // run.sequence_length))
    size, ranks, rank = run.train.micro_batch_size, dist.get_world_size(), dist.get_rank()
    sums = torch.zeros(2, dtype=torch.float64)
    engine.eval()
    with torch.no_grad():
        for first in range(0, len(chosen), size * ranks):
            mine = chosen[first + rank * size : first + (rank + 1) * size]
            # A rank left without sequences runs one that does not count: ZeRO-3 gathers weights with all ranks.
            batch = to_batch([dataset.row(int(i)) for i in (mine if len(mine) else chosen[:1])], engine.device)
            mean = float(engine(*batch._replace(loss_tokens=batch.loss_tokens.clamp(min=1))))
            if len(mine):
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
    validation: Sequences,
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
        consolidate(engine, job.best_dir, partial(save_trained, job, index))


def _initial_model(run: TrainingRun, vocab_size: int) -> Decoder:
    model = Decoder(run.model, vocab_size)
    if run.model.initial_weights is None:
        initialize(model, run.seed)
    else:
        load_initial_weights(model, run.model.initial_weights, run.model_section)
    choose_weights(model, run.train, run.seed)
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


def _peak_flops(job: TrainingJob, device: torch.device) -> float | None:
    """Peak FLOP/s of all ranks together; None where what the run was planned for is not what it runs on."""
    if job.hardware is None or job.hardware.is_gpu != (device.type == "cuda"):
        return None
    devices = dist.get_world_size() if job.hardware.is_gpu else 1
    return devices * job.hardware.peak_flops(job.run.engine.precision)


def _due(step: int, interval: int, config: TrainConfig) -> bool:
    return step % interval == 0 or step == config.max_steps


def _finished(state: TrainingState, config: TrainConfig) -> bool:
    stopped = 0 < config.early_stopping_evals <= state.evals_without_improvement
    return stopped or state.step >= config.max_steps
