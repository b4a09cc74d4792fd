"""DeepSpeed's configuration, derived from ours; imports no DeepSpeed, so that it can be checked before a run."""

from __future__ import annotations

from typing import Any

from flows.config import ConfigError
from flows.config.checks import require
from flows.config.engine import Offload, Precision
from flows.config.optimizer import Optimizer
from flows.config.training import TrainingRun

CUT_BY_ROWS = r"(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.weight$"
"""Matrices of which a tensor-parallel rank computes some outputs: heads of attention, units of the feed-forward."""
CUT_BY_COLUMNS = r"(self_attn\.o_proj|mlp\.down_proj)\.weight$"
"""Matrices of which it takes some inputs; the ranks' results are added up. Norms, embedding and head stay whole."""

_MEASURE_FOR_THEMSELVES = ("fp16", "data_types", "torch_autocast")
"""Raw DeepSpeed settings of which each brings an optimizer that scales losses or needs the norm itself."""


_OURS = {
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "activation_checkpointing": "engine.activation_checkpointing",
    "train_batch_size": "train.global_batch_size",
}
"""Raw DeepSpeed settings that would change nothing, or contradict, and what to set instead."""


def deepspeed_config(run: TrainingRun) -> dict[str, Any]:
    """DeepSpeed's configuration for this run, the user's raw keys merged in.

    Raises:
        ConfigError: A raw key contradicts a setting of ours, or has no effect beside it.
    """
    engine = run.engine
    for key, setting in _OURS.items():
        require(
            key not in engine.deepspeed,
            f"engine.deepspeed.{key}",
            engine.deepspeed.get(key),
            f"would not be read: it is {setting} that decides",
            f"Remove it, and set {setting}.",
        )
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "gradient_clipping": run.train.gradient_clipping,  # always given: DeepSpeed's default is 1.0, not off
        "bf16": {"enabled": engine.precision != Precision.fp32},
        "zero_optimization": _zero(run),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it has to be compiled; torch's own updates what is offloaded as well
        "steps_per_print": 10**9,  # we log
    }
    if engine.tensor_parallel_size > 1:
        own["tensor_parallel"] = _tensor_parallel(engine.tensor_parallel_size)
    return _merged(own, engine.deepspeed, "engine.deepspeed")


def can_clip_in_update(run: TrainingRun) -> bool:
    """Whether AdamW's update may clip gradients instead of DeepSpeed; why: `flows.training.gradient_clipping`."""
    engine, raw = run.engine, run.engine.deepspeed
    return (
        run.train.optimizer.name == Optimizer.adamw
        and engine.zero_stage <= 2
        and engine.offload_optimizer == Offload.none
        and engine.pipeline_stages == engine.tensor_parallel_size == 1
        and run.model.num_experts == 0
        and not any(key in raw for key in _MEASURE_FOR_THEMSELVES)
        and "zenflow" not in raw.get("zero_optimization", {})
    )


def without_clipping(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration with every pass over the gradients before the update switched off."""
    zero = dict(settings["zero_optimization"])
    if zero["stage"]:
        zero["compute_grad_norm"] = False
    bf16 = {**settings["bf16"], "check_grad_overflow": False}
    return {**settings, "gradient_clipping": 0.0, "zero_optimization": zero, "bf16": bf16}


def _zero(run: TrainingRun) -> dict[str, Any]:
    engine = run.engine
    section: dict[str, Any] = {"stage": engine.zero_stage}
    if run.train.optimizer.name == Optimizer.muon:
        section |= {"round_robin_gradients": False, "parameter_alignment": False}  # it finds matrices in flat parts
    for name, where in (("optimizer", engine.offload_optimizer), ("param", engine.offload_parameters)):
        if where != Offload.none:
            path = {"nvme_path": str(engine.nvme_path)} if where == Offload.nvme else {}
            section[f"offload_{name}"] = {"device": where.value, **path}
    if engine.offload_optimizer == Offload.nvme and run.train.ema_decay:
        section["offload_optimizer"]["buffer_count"] = 5  # weight, gradient, AdamW's two moments, and the average
    return section


def _tensor_parallel(size: int) -> dict[str, Any]:
    # DeepSpeed names the cuts by what each rank takes, not by what it holds.
    specs = [
        {"patterns": [rf".*\.{CUT_BY_COLUMNS}"], "partition_type": "row"},
        {"patterns": [rf".*\.{CUT_BY_ROWS}"], "partition_type": "column"},
    ]
    return {"autotp_size": size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def _merged(own: dict[str, Any], raw: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(own)
    for key, value in raw.items():
        if isinstance(own.get(key), dict) and isinstance(value, dict):
            merged[key] = _merged(own[key], value, f"{path}.{key}")
        elif key in own and own[key] != value:
            raise ConfigError(
                f"{path}.{key}={value} contradicts the run's own setting, which makes it {own[key]}. "
                f"Remove the raw key and change the setting itself."
            )
        else:
            merged[key] = value
    return merged
