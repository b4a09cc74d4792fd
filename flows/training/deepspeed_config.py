"""DeepSpeed's configuration, derived from ours; imports no DeepSpeed, so that it can be checked before a run."""

from __future__ import annotations

from typing import Any

from flows.config import ConfigError
from flows.config.engine import Precision
from flows.config.optimizer import Optimizer
from flows.config.training import TrainingRun


def deepspeed_config(run: TrainingRun) -> dict[str, Any]:
    """DeepSpeed's configuration for this run, the user's raw keys merged in.

    Raises:
        ConfigError: A raw key contradicts a setting of ours.
    """
    zero: dict[str, Any] = {"stage": run.engine.zero_stage}
    if run.train.optimizer.name == Optimizer.muon:
        zero |= {"round_robin_gradients": False, "parameter_alignment": False}  # it finds the matrices in flat parts
    own = {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "gradient_clipping": run.train.gradient_clipping,  # always given: DeepSpeed's default is 1.0, not off
        "bf16": {"enabled": run.engine.precision == Precision.bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # we log
    }
    return _merged(own, run.engine.deepspeed, "engine.deepspeed")


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
