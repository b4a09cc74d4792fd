"""Tensor parallelism (arXiv:1909.08053) by DeepSpeed's AutoTP: the ranks' parts put together again."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from flows.training.deepspeed_config import CUT_BY_COLUMNS, CUT_BY_ROWS


def whole_weight(name: str, part: torch.Tensor) -> torch.Tensor:
    """The whole matrix of which each tensor-parallel rank holds a part; all of them have to call it.

    Args:
        name: Of the weight in the decoder; says how it is cut, if at all.
        part: This rank's.
    """
    dim = 0 if re.search(CUT_BY_ROWS, name) else 1 if re.search(CUT_BY_COLUMNS, name) else None
    if dim is None:
        return part
    group = groups.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim)
