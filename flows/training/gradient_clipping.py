"""Who measures and clips gradients: DeepSpeed, or AdamW's own pass where it runs as a kernel.

DeepSpeed reads all gradients for overflow, again in float64 for the norm, and rewrites them to clip, waiting for each
result. Where ranks share data alone, ZeRO-0, 1 and 2 can be told to do none of that: `gradient_squares` then reads them
once, and `kernels.adamw` clips by that, or leaves the update out, as it goes. What stays is that ZeRO-1 and 2 hand the
optimizer a float32 copy of a bf16 gradient, and copy the new weights to bf16 themselves.

ZeRO-3 has no switch for its norm, and multiplies gradients by the clipping factor even where that is 1; loss scaling,
and parallelism that cuts matrices, layers or experts, need DeepSpeed's knowledge of what a norm has to count once.
There the kernel updates what DeepSpeed has clipped.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import clip_grad_norm_

from flows.training.adamw import AdamW
from kernels.adamw import gradient_squares


def keep_norm(engine: DeepSpeedEngine) -> None:
    """Makes ZeRO-0 in float32 keep the norm that DeepSpeed computes there to clip, and drops."""
    engine.clip_fp32_gradients = partial(_clip_and_keep_norm, engine)


def _clip_and_keep_norm(engine: DeepSpeedEngine) -> None:
    norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping(), mpu=engine.mpu)
    engine._global_grad_norm = norm


def measure_gradients(engine: DeepSpeedEngine) -> None:
    """Has the next update clip by the norm of what is accumulated, if it clips; called right before it."""
    zero, optimizer = engine.optimizer, engine.basic_optimizer
    if not isinstance(optimizer, AdamW) or optimizer.max_norm is None:
        return
    if zero is optimizer:  # ZeRO-0: every rank has all gradients
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        optimizer.squares = gradient_squares(gradients)
    else:  # each has its part, cut along parameters, and padding
        gradients = [gradient for group in zero.averaged_gradients.values() for gradient in group]
        optimizer.squares = gradient_squares(gradients)
        dist.all_reduce(optimizer.squares, group=zero.dp_process_group)


def gradient_measures(engine: DeepSpeedEngine) -> dict[str, float]:
    """`grad_norm`: of all gradients of the last update, before clipping; `skipped_updates`: how many were not finite.

    There is no norm where nobody needs one to update, which would be a pass for the log alone: at ZeRO-0 with neither
    clipping nor kernels. It is left out, too, where it is not finite; the number of skipped updates only counts then.
    """
    optimizer, skipped = engine.basic_optimizer, engine.skipped_steps
    norm = engine.get_global_grad_norm()
    if isinstance(optimizer, AdamW) and optimizer.squares is not None:
        norm = optimizer.squares.sqrt()
        steps = torch.stack([state["step"] for state in optimizer.state.values() if "step" in state])
        skipped = engine.global_steps - int(steps.max())
    measures = {}
    if norm is not None and math.isfinite(norm):
        measures["grad_norm"] = float(norm)
    if skipped:
        measures["skipped_updates"] = skipped
    return measures
