"""The training loop: one for every objective and every way to share work among ranks."""

from __future__ import annotations

import json
import math
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from flows.artifact import write_json_atomically
from flows.config import flat_settings
from flows.config.training import TrainConfig, TrainingRun
from flows.data.masking import view_of
from flows.data.mixture import epochs, open_split
from flows.data.packed import Sequences
from flows.launcher import Heartbeat
from flows.model.checkpoint import load_initial_model, load_initial_weights, load_layers
from flows.model.decoder import Decoder, initialize
from flows.model.transformers_model import named_weights_module, new_encoder
from flows.training.batches import IGNORED, micro_batches, validation_batches
from flows.training.checkpoint import Checkpoints, TrainingState
from flows.training.consolidation import consolidate
from flows.training.engine import (
    NonFiniteLossError,
    build_engine,
    close_engine,
    set_learning_rate,
    start_process_group,
    train_step,
    trained_module,
    validation_loss,
)
from flows.training.gradient_clipping import gradient_measures
from flows.training.growing_sparsity import GrowingSparsity, has_all_zeros
from flows.training.job import TrainingJob
from flows.training.metrics_log import MetricsLog
from flows.training.on_policy import taught_batches
from flows.training.plan import flops_per_token, teacher_shape
from flows.training.preemption import StoppedEarly, any_rank_asked_to_save
from flows.training.receipts import ReceiptLog, first_link, next_link
from flows.training.saving import save_trained
from flows.training.schedules import ema_decay, learning_rate
from flows.training.step_meter import StepMeter
from flows.training.step_profile import StepProfile
from flows.training.teacher_cache import TeacherCache
from flows.training.teaching import with_loss
from flows.training.trainable import choose_weights, count_weights, keep_zeros
from flows.training.weight_average import averaged_weights, set_ema_decay
from flows.training.weight_parts import named_parts, named_projections


def train(job: TrainingJob) -> None:
    """Trains one model on all ranks, from the newest checkpoint if there is one; writes the best weights.

    Raises:
        NonFiniteLossError: On every rank, before the optimizer step; checkpoints stay as they are.
        StoppedEarly: On every rank, after a checkpoint: one of them was sent SIGTERM.
    """
    run = job.run
    start_process_group()
    heartbeat = Heartbeat(job.log_dir)
    heartbeat.beat()
    index = json.loads((job.tokens_dir / "index.json").read_text())
    dataset = open_split(job.tokens_dir, "train", run.sequence_length, run.document_masks, run.mixture)
    held_out_dir = job.validation_dir or job.tokens_dir
    as_learned = view_of(run.model.family, job.tokenizer_dir)
    validation = as_learned(
        open_split(held_out_dir, "validation", run.sequence_length, run.document_masks, run.mixture)
    )
    cache = None if job.cache_dir is None else TeacherCache(job.cache_dir)
    read_records = None if cache is None else cache.records
    model = initial_model(job, index["vocab_size"], index.get("labels"))
    counts = count_weights(model)
    zeros = GrowingSparsity(model, run.train.sparsify)
    engine = build_engine(with_loss(model, job, cache), run)
    del model  # a rank may need a part of it only
    checkpoints = Checkpoints(job.checkpoint_dir, engine, named_parts(engine) | named_projections(engine), run)
    state = checkpoints.load()
    zeros.look(engine)
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
        torch.manual_seed(hash((run.seed, state.step, dist.get_rank())))  # a resumed run drops what others would
        with checkpoints.finished_on_error(), meter.step(), profile.step(state.step):
            with meter.loading():
                shown = as_learned(dataset, run.train.masked_share, (run.seed, state.step))
                batches = micro_batches(shown, run, state.step, engine.device, read_records)
            if run.on_policy_share > 0:
                batches = taught_batches(engine, batches, run, state.step, index["eos_token_id"])
            loss = train_step(engine, batches, state.step)
        state.step += 1
        zeros.grow(engine, state.step)
        state.receipt = next_link(state.receipt, state.step, batches.sample_ids)
        state.loss_tokens += batches.loss_tokens
        if receipts:
            receipts.write(state.step, state.receipt)
        heartbeat.beat()
        if _due(state.step, run.train.log_interval_steps, run.train):
            measured = meter.collect()
            measured |= gradient_measures(engine)
            if log:
                log.write(state.step, train_loss=loss, learning_rate=rate, **measured)
        if _due(state.step, run.train.eval_interval_steps, run.train):
            with checkpoints.finished_on_error(), averaged_weights(engine, run.train.ema_decay > 0):
                _evaluate_and_keep_best(engine, validation, job, state, log, index, heartbeat)
        due = _due(state.step, run.train.checkpoint_interval_steps, run.train)
        asked = any_rank_asked_to_save(engine.device)
        if due or asked:
            checkpoints.save(state)
        if asked and not _finished(state, run.train):
            checkpoints.wait()
            close_engine(engine)
            raise StoppedEarly(f"stopped by SIGTERM after step {state.step}, which is saved")
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
                **counts,
                "train_tokens": state.step * tokens_per_step,
                "loss_tokens": state.loss_tokens,
                "epochs": round(state.step * run.train.global_batch_size / len(dataset), 3),
                "epochs_by_corpus": epochs(dataset, state.step * run.train.global_batch_size),
                "receipt": state.receipt,
                "measured": meter.summary(),
            },
        )
    close_engine(engine)


def evaluate(engine: DeepSpeedEngine, dataset: Sequences, run: TrainingRun, heartbeat: Heartbeat) -> float:
    """Validation cross-entropy in nats per token or label, over the same first `eval_tokens` tokens each time.

    Args:
        engine: Of this rank; all ranks take part.
        dataset: The validation split.
        run: The run's configuration.
        heartbeat: Beats after each batch.

    Raises:
        NonFiniteLossError: The loss is not finite.
    """
    chosen = dataset.first(max(1, run.train.eval_tokens // run.sequence_length))
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in validation_batches(dataset, chosen, run, engine.device):
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
    if not has_all_zeros(job.run.train.sparsify, state.step):
        return  # weights that are yet to become zero make it better than it will be
    state.evals_without_improvement += 1
    if loss < state.best_loss:
        state.best_loss, state.evals_without_improvement = loss, 0
        consolidate(engine, job.best_dir, partial(save_trained, job, trained_module(engine), index))


def initial_model(job: TrainingJob, vocab_size: int, labels: list[str] | None = None) -> nn.Module:
    """The model as it is before the first step, the same on every rank."""
    model: nn.Module
    run = job.run
    torch.manual_seed(run.seed)  # the same new head, or encoder, on every rank
    if job.start_dir is not None:
        model = Decoder(run.model, vocab_size)
        if run.student_layers:
            load_layers(model, job.start_dir, run.student_layers)
        else:
            load_initial_weights(model, job.start_dir, run.model_section)
        if run.keep_zeros:
            keep_zeros(model)
    elif run.model.initial_weights is not None:
        model = load_initial_model(run.model, vocab_size, run.model_section, labels)
    elif labels is not None:
        model = new_encoder(run.model, vocab_size, labels, run.sequence_length)
    else:
        model = Decoder(run.model, vocab_size)
        initialize(model, run.seed)
    choose_weights(named_weights_module(model), run.train, run.seed, run.engine.pipeline_stages)
    return model


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
