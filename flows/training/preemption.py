"""Preemption: when any rank has been sent SIGTERM, all of them save at the same step and stop."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flows.config import RunError
from flows.launcher import asked_to_save


class StoppedEarly(RunError):
    """The ranks saved and stopped because one of them was asked to."""


def any_rank_asked_to_save(device: torch.device | str) -> bool:
    """Whether any rank has been sent SIGTERM; the same answer on every rank, each of which has to ask."""
    asked = asked_to_save()
    if dist.get_world_size() == 1:
        return asked
    flag = torch.tensor(float(asked), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
