"""What each rank holds of the weights, by names that mean the same contents on every rank, and how to make whole ones.

Data-parallel ranks hold the same parameters, whole or cut by ZeRO, which `flows.training.fragments` knows about. Stages
of a pipeline hold other parameters each, tensor-parallel ranks parts of matrices, expert-parallel ranks some experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import groups
from torch import Tensor, nn

from flows.model.transformers_model import named_weights_module
from flows.training.deepspeed_config import CUT_BY_COLUMNS, CUT_BY_ROWS
from flows.training.expert_parallel import expert_name

_PART = re.compile(r"(.*)#dim(\d)-part(\d+)-of-(\d+)")


def named_parts(engine: DeepSpeedEngine) -> dict[str, nn.Parameter]:
    """This rank's parameters: by their name in the decoder, with a mark at its end where it is one part of several."""
    if isinstance(engine, PipelineEngine):
        weights: dict[str, nn.Parameter] = engine.module.named_weights
        return weights
    model = named_weights_module(engine.module.model)
    named = {expert_name(model, name): parameter for name, parameter in model.named_parameters()}
    if engine.autotp_size() <= 1:
        return named
    rank, ranks = groups.get_tensor_model_parallel_rank(), engine.autotp_size()
    return {
        name if (dim := _cut_dim(name)) is None else f"{name}#dim{dim}-part{rank}-of-{ranks}": parameter
        for name, parameter in named.items()
    }


def named_projections(engine: DeepSpeedEngine) -> dict[str, nn.Parameter]:
    """What is trained beside the model and is no part of it: in checkpoints, and not in what is saved as the model."""
    features = None if isinstance(engine, PipelineEngine) else engine.module.features
    return {} if features is None else {f"features.{name}": weight for name, weight in features.named_parameters()}


def is_own(engine: DeepSpeedEngine, name: str, parameter: nn.Parameter) -> bool:
    """Whether this rank answers for a part, among ranks other than data-parallel ones that hold the same contents."""
    if getattr(parameter, "ds_pipe_replicated", False):  # a tied matrix, of which the first stage has one too
        return False
    cut = engine.autotp_size() <= 1 or _PART.match(name) is not None
    return bool(cut or groups.get_tensor_model_parallel_rank() == 0)


def part_of(whole: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The part that a rank should hold under `name`, cut from whole weights; None if they lack it."""
    found = _PART.match(name)
    if found is None:
        return whole.get(name)
    base, dim, part, parts = found[1], *map(int, found.groups()[1:])
    return whole[base].chunk(parts, dim)[part] if base in whole else None


def whole_name(name: str) -> str:
    """Name in the decoder of the weight that `name` is, or is a part of."""
    found = _PART.match(name)
    return found[1] if found else name


def whole_shape(name: str, shape: Sequence[int]) -> list[int]:
    """Shape of the weight that `name`, of this shape, is or is a part of."""
    whole = list(shape)
    if found := _PART.match(name):
        whole[int(found[2])] *= int(found[4])
    return whole


def gather_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Whole weights by their names in the decoder, on CPU.

    Every rank has to call it; rank 0 gets them, the others an empty dict.
    """
    mine = named_parts(engine)
    listed: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(listed, {name: (_shape(weight), weight.dtype) for name, weight in mine.items()})
    holders: dict[str, int] = {}
    for rank, held in enumerate(listed):
        for name in held:
            holders.setdefault(name, rank)
    parts: dict[str, Tensor] = {}
    for name, holder in holders.items():  # in the same order on every rank
        if name in mine:
            with deepspeed.zero.GatheredParameters([mine[name]]):  # a no-op below ZeRO-3
                parts |= _sent_to_first(name, holder, mine[name].detach())
        elif dist.get_rank() == 0:
            shape, dtype = listed[holder][name]
            parts |= _sent_to_first(name, holder, torch.empty(shape, dtype=dtype, device=engine.device))
    return joined(parts)


def _sent_to_first(name: str, holder: int, weight: Tensor) -> dict[str, Tensor]:
    rank = dist.get_rank()
    if holder != 0 and rank == holder:
        dist.send(weight.contiguous(), 0)
    if holder != 0 and rank == 0:
        dist.recv(weight, holder)
    return {name: weight.cpu().clone()} if rank == 0 else {}


def joined(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights from their parts, which are given up one by one; of one in parts, all have to be there."""
    whole: dict[str, Tensor] = {}
    for name in list(parts):
        found = _PART.match(name)
        if found is None:
            whole[name] = parts.pop(name)
        elif name in parts:
            base, dim, _, count = found[1], *map(int, found.groups()[1:])
            whole[base] = torch.cat([parts.pop(f"{base}#dim{dim}-part{part}-of-{count}") for part in range(count)], dim)
    return whole


def _cut_dim(name: str) -> int | None:
    return 0 if re.search(CUT_BY_ROWS, name) else 1 if re.search(CUT_BY_COLUMNS, name) else None


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
