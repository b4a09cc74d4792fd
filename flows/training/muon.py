"""Muon over whole matrices or over the flat parts that ZeRO 1-2 hand an optimizer.

DeepSpeed's own Muon clips what is orthogonalized already (DeepSpeed#8439), and torch's needs whole matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz

RMS = 0.2
"""Root mean square of AdamW's updates, to which Muon's are scaled (arXiv:2502.16982, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for hidden matrices (kellerjordan.github.io/posts/muon), AdamW for everything else.

    Equal to torch.optim.Muon(adjust_lr_fn="match_rms_adamw") for the former. Where ZeRO 1-2 have cut the flattened
    group over ranks, each keeps its part of the momentum; the updates are gathered in bf16, in which the iteration runs
    anyway, and each rank orthogonalizes the matrices that its part touches.

    Args:
        matrices: Parameter group of hidden matrices.
        others: Parameter groups for AdamW.
        learning_rate: Of all groups.
        momentum: Nesterov momentum of the matrices.
        betas: Of AdamW.
        eps: Of AdamW.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        others: Sequence[dict[str, Any]],
        learning_rate: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        shapes = [tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in matrices["params"]]
        hidden = {**matrices, "momentum": momentum, "shapes": shapes}
        super().__init__([hidden, *others], {"lr": learning_rate, "betas": betas, "eps": eps})
        self._adamw = torch.optim.AdamW(self.param_groups[1:], learning_rate, betas, eps) if others else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        for group in self.param_groups:
            if "shapes" in group:
                self._update(group)
            elif self._adamw is not None:
                self._adamw.param_groups = [group]
                self._adamw.state = self.state
                self._adamw.step()

    def _update(self, group: dict[str, Any]) -> None:
        parameters, shapes = group["params"], group["shapes"]
        whole = [tuple(parameter.shape) for parameter in parameters] == shapes
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            direction = parameter.grad.lerp(state["momentum_buffer"], group["momentum"]).bfloat16()
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            update = orthogonalized(direction) if whole else _orthogonalized_part(direction, shapes)
            parameter.add_(update, alpha=-group["lr"])


def orthogonalized(direction: Tensor) -> Tensor:
    """The nearest matrix with equal singular values, in the size of AdamW's updates, float32 [rows, columns].

    Five steps of Newton and Schulz: singular values end between 0.7 and 1.2.
    """
    update = _zeropower_via_newtonschulz(direction, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)
    return update.float() * (RMS * math.sqrt(max(direction.shape)))


def _orthogonalized_part(part: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """This rank's part of the orthogonalized matrices, float32 [n], from its part [n] of the flattened directions."""
    from deepspeed.utils import groups

    group = groups._get_data_parallel_group()
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    size = part.numel()
    total = sum(rows * columns for rows, columns in shapes)
    if not total <= ranks * size < total + ranks * size:
        raise AssertionError(f"{ranks} parts of {size} weights are no cut of matrices with {total}")
    flat = part.new_empty(ranks * size)
    dist.all_gather_into_tensor(flat, part, group=group)
    mine = torch.zeros(size, dtype=torch.float32, device=part.device)
    first = 0
    for rows, columns in shapes:
        last = first + rows * columns
        start, end = max(first, rank * size), min(last, (rank + 1) * size)
        if start < end:
            update = orthogonalized(flat[first:last].view(rows, columns)).flatten()
            mine[start - rank * size : end - rank * size] = update[start - first : end - first]
        first = last
    return mine
