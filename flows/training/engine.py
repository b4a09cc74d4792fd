"""The DeepSpeed engine, built from the typed configuration; the loop sees one kind, whatever ranks share."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterable
from functools import partial
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import nn
from torch.utils.checkpoint import checkpoint

from flows.config import RunError
from flows.config.engine import Precision
from flows.config.training import TrainingRun
from flows.model.decoder import Decoder
from flows.training.adamw import AdamW
from flows.training.batches import Batch
from flows.training.deepspeed_config import can_clip_in_update, deepspeed_config, without_clipping
from flows.training.expert_parallel import balance_penalty, share_experts, split_expert_groups
from flows.training.fp8_linear import multiply_in_fp8
from flows.training.gradient_clipping import keep_norm, measure_gradients
from flows.training.nvme import reserve
from flows.training.objectives import LossModule
from flows.training.optimizers import build_optimizer
from flows.training.pipeline import PipelineDecoder, merge_groups, pipeline_loss, pipeline_step
from flows.training.quantization_aware import round_while_training
from flows.training.sequence_parallel import share_sequences
from flows.training.weight_average import keep_average


class NonFiniteLossError(RunError):
    """The loss is NaN or infinite; the optimizer step was not taken."""


def start_process_group() -> None:
    """Joins the ranks that `launcher` started (or makes a group of one), NCCL on CUDA and gloo on CPU."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Else DeepSpeed compiles a shared-memory collective for 30 s that only tensor-parallel inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _leave_out_deepspeeds_muon()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _leave_out_deepspeeds_muon() -> None:
    """Puts empty modules in the place of DeepSpeed's Muon, which every ZeRO engine imports and none of ours uses.

    Its decorators load torch's compiler: two of the six CPU seconds that a rank takes to start.
    """
    for module, name in (("muon_optimizer", "MuonWithAuxAdam"), ("original_muon", "muon_update")):
        nobody = ModuleType(f"deepspeed.runtime.zero.muon.{module}")
        setattr(nobody, name, type(name, (), {}))
        sys.modules.setdefault(nobody.__name__, nobody)


def build_engine(module: LossModule, run: TrainingRun) -> DeepSpeedEngine:
    """A DeepSpeed engine around `module`; the same weights must be in it on every rank."""
    model = cast(Decoder, module.model)
    share_sequences(model, run)
    if run.model.num_experts:
        share_experts(model, run)
        module.penalty = partial(balance_penalty, model, run)
    if run.engine.precision == Precision.fp8:
        multiply_in_fp8(model, get_accelerator().device_name())
    if run.train.quantization_aware.scheme is not None:
        round_while_training(model, run.train.quantization_aware)
    if run.engine.activation_checkpointing:
        _recompute_layers(model)
    if run.engine.pipeline_stages > 1:
        whole: nn.Module = PipelineDecoder(model, module.loss, run)
    else:
        whole = module
    optimizer = build_optimizer(whole, run.train.optimizer, run.model.kernels.value)
    if run.train.ema_decay:
        keep_average(optimizer)
    if run.engine.pipeline_stages > 1:
        merge_groups(optimizer)
    if run.model.num_experts:
        split_expert_groups(optimizer)
    settings = deepspeed_config(run)
    if can_clip_in_update(run) and cast(AdamW, optimizer).runs_kernel_on(get_accelerator().device_name()):
        settings = without_clipping(settings)
        cast(AdamW, optimizer).max_norm = run.train.gradient_clipping
    ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))  # else it warns; every one of ours is tested with ZeRO
    reserved = reserve(run.engine.nvme_path, dist.get_rank()) if run.engine.nvme_path else None
    try:
        engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=settings)
    except (DeepSpeedConfigError, AssertionError, ValueError) as error:
        if not run.engine.deepspeed:
            raise
        raise RunError(
            f"DeepSpeed {deepspeed.__version__} does not run this engine with engine.deepspeed={run.engine.deepspeed}: "
            f"{error}. Remove what it names there, or change the setting that it contradicts."
        ) from error
    engine.reserved = reserved  # held as long as the engine is
    keep_norm(engine)
    engine.compiled_code = _compile_apart() if run.engine.compile else None
    if run.engine.compile:
        engine.compile()
    return engine


def _compile_apart() -> TemporaryDirectory[str]:
    """Has this process compile into a directory of its own.

    In torch's shared one a process that is killed leaves half a library, which every later run of the same model would
    load, and fail.
    """
    directory = TemporaryDirectory(prefix="millrace-compiled-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory.name
    return directory


def _recompute_layers(model: Decoder) -> None:
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def trained_module(engine: DeepSpeedEngine) -> nn.Module:
    """The model without its loss; a rank may hold a part of it only."""
    module: nn.Module = engine.module if isinstance(engine, PipelineEngine) else engine.module.model
    return module


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    """Sets the learning rate of the next optimizer update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def train_step(engine: DeepSpeedEngine, batches: Iterable[Batch], step: int) -> float:
    """Runs one optimizer update on this rank's micro batches; the mean loss over all ranks, in nats per token.

    Raises:
        NonFiniteLossError: On every rank alike, before the update.
    """
    if isinstance(engine, PipelineEngine):
        return pipeline_step(engine, batches, partial(_check_finite, step=step))
    total = torch.zeros((), device=engine.device)
    accumulation: int = engine.gradient_accumulation_steps()
    for micro_step, batch in enumerate(batches, start=1):
        loss = engine(*batch)
        engine.backward(loss)
        total += loss.detach().float()
        if micro_step == accumulation:
            dist.all_reduce(total)
            mean = float(total) / (accumulation * dist.get_world_size())
            _check_finite(mean, step)
            measure_gradients(engine)
        engine.step()
    return mean


def _check_finite(mean: float, step: int) -> None:
    if not math.isfinite(mean):
        raise NonFiniteLossError(
            f"the training loss is {mean} at step {step + 1}; the optimizer step was not taken and checkpoints "
            f"stay as they are. Set a lower train.optimizer.learning_rate, a longer train.warmup_steps or a "
            f"train.gradient_clipping above 0, or look at the data of this step."
        )


def validation_loss(engine: DeepSpeedEngine, batch: Batch) -> float | None:
    """Cross-entropy of one micro batch divided by its `loss_tokens`; every rank has to call it.

    None on a rank that does not see the scores: a stage of a pipeline other than the last.
    """
    if isinstance(engine, PipelineEngine):
        return pipeline_loss(engine, batch)
    engine.eval()
    with torch.no_grad():
        loss = float(engine(*batch))
    engine.train()
    return loss


def close_engine(engine: DeepSpeedEngine) -> None:
    """Lets go of the engine and leaves the group in step with the other ranks."""
    dist.barrier()
    if engine.compiled_code is not None:
        engine.compiled_code.cleanup()
    engine.destroy()
    dist.destroy_process_group()
    time.sleep(0.2)  # a gloo group that is torn down during interpreter exit can abort (pytorch#190489)
