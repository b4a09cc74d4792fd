"""The DeepSpeed engine, built from the typed configuration."""

from __future__ import annotations

import logging
import sys
import time
from types import ModuleType

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from flows.config.training import TrainingRun
from flows.training.deepspeed_config import deepspeed_config
from flows.training.optimizers import build_optimizer
from flows.training.weight_average import keep_average


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


def build_engine(module: nn.Module, run: TrainingRun) -> DeepSpeedEngine:
    """A DeepSpeed engine around `module`; the same weights must be in it on every rank."""
    optimizer = build_optimizer(module, run.train.optimizer)
    if run.train.ema_decay:
        keep_average(optimizer)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(run))
    return engine


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    """Sets the learning rate of the next optimizer update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole weights by name, on CPU; every rank has to call it, rank 0 gets them, the others an empty dict."""
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):  # a no-op below ZeRO-3
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def close_engine(engine: DeepSpeedEngine) -> None:
    """Lets go of the engine and leaves the group in step with the other ranks."""
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()
    time.sleep(0.2)  # a gloo group that is torn down during interpreter exit can abort (pytorch#190489)
