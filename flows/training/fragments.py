"""What each rank holds of a parameter: contiguous pieces of its float32 weight and optimizer state, at any ZeRO stage.

DeepSpeed keeps parameters end to end in flat tensors and cuts those over ranks, each stage in its own way (ZeRO,
arXiv:1910.02054). Named by parameter and position within it, the pieces no longer say how they were cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import Tensor, nn

from flows.training.weight_parts import is_own

WEIGHT = "weight"
"""Key of the float32 weight among the tensors of a fragment; the others are the optimizer's, e.g. `exp_avg`."""


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive elements of one flattened parameter, kept by this rank."""

    name: str
    """The parameter's name in the model."""
    start: int
    """Position of the first element within the flattened parameter."""
    numel: int
    flat: Tensor
    """Float32 tensor [any] that the optimizer updates; the fragment is a part of it."""
    offset: int
    """Position of the first element within `flat`."""
    state: dict[str, Any]
    """The optimizer's state of `flat`: tensors of its shape, and scalars; empty before the first update."""

    def part(self, tensor: Tensor) -> Tensor:
        """This fragment's elements [numel] of `flat`, or of a state of its shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weight and optimizer state: [numel], or [] for state that is one number."""
        yield WEIGHT, self.part(self.flat)
        for key, value in self.state.items():
            if isinstance(value, Tensor) and value.shape == self.flat.shape:
                yield key, self.part(value)
            else:
                yield key, torch.as_tensor(value, dtype=_number_dtype(value)).detach()


def held_fragments(engine: DeepSpeedEngine, weights: Iterable[tuple[str, nn.Parameter]]) -> Iterator[Fragment]:
    """All that this rank holds of the trained parameters; without ZeRO every rank holds everything.

    A fragment's tensors are there until the next one is asked for: what is kept on NVMe passes through few buffers.

    Args:
        engine: Between two optimizer updates.
        weights: The model's parameters by name; frozen ones are left out, they do not change.
    """
    zero = engine.optimizer
    state = inner_optimizer(engine).state
    trained: list[tuple[str, Any]] = [(name, parameter) for name, parameter in weights if parameter.requires_grad]
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3: each parameter cut evenly, its end padded
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            with _in_memory(zero, group):
                for name, parameter in trained:
                    its_group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                    start = dist.get_rank(engine.seq_data_parallel_group) * size
                    numel = min(size, parameter.ds_numel - start)
                    if its_group == group and numel > 0:
                        yield Fragment(name, start, numel, flat, offset, state[flat])
        return
    for name, parameter in trained:
        if isinstance(zero, torch.optim.Optimizer):  # ZeRO-0 in float32: torch's own optimizer
            yield Fragment(name, 0, parameter.numel(), parameter, 0, state[parameter])
        elif parameter._hp_mapping is not None:  # ZeRO-1, ZeRO-2: groups of parameters cut evenly
            piece = parameter._hp_mapping
            flat = _flat_partitions(zero)[piece.param_group_index]
            inside, of_flat = piece.lp_fragment_address, piece.hp_fragment_address
            yield Fragment(name, inside.start, inside.numel, flat, of_flat.start, state[flat])


def own_fragments(engine: DeepSpeedEngine, weights: Iterable[tuple[str, nn.Parameter]]) -> Iterator[Fragment]:
    """What this rank has to write, so that all ranks together write every element once; see `held_fragments`."""
    for piece in held_fragments(engine, [(name, weight) for name, weight in weights if is_own(engine, name, weight)]):
        if not isinstance(engine.optimizer, torch.optim.Optimizer):
            yield piece
            continue
        expert_group = getattr(piece.flat, "group_name", None)  # of ranks that hold the same experts
        group = groups._get_expert_data_parallel_group(expert_group) if expert_group else engine.seq_data_parallel_group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        first, end = piece.numel * rank // ranks, piece.numel * (rank + 1) // ranks
        if end > first:
            yield Fragment(piece.name, first, end - first, piece.flat, first, piece.state)


def flat_states(engine: DeepSpeedEngine) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each tensor that the optimizer updates, with its state; both are there until the next is asked for."""
    zero, state = engine.optimizer, inner_optimizer(engine).state
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        yield from state.items()
        return
    for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
        with _in_memory(zero, group):
            yield flat, state[flat]


def inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's."""
    zero = engine.optimizer
    return zero if isinstance(zero, torch.optim.Optimizer) else zero.optimizer


def spread_weights(engine: DeepSpeedEngine) -> None:
    """Makes the weights that the forward pass uses those of the float32 fragments, on all ranks."""
    zero = engine.optimizer
    if isinstance(zero, torch.optim.Optimizer):
        return  # they are the same tensors
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero.parameter_offload.partition_all_parameters()  # drops gathered copies of the weights as they were
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        with _in_memory(zero, group):
            zero._reassign_or_swap_out_partitioned_parameters(group)


def is_on_nvme(engine: DeepSpeedEngine) -> bool:
    """Whether float32 weights and optimizer state are kept on NVMe."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


@contextmanager
def _in_memory(zero: Any, group: int) -> Iterator[None]:
    """One of ZeRO-3's groups is in memory inside, and what was changed there is kept; for all but NVMe it always is."""
    if not zero._swappable_optimizer_subgroup(group):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        zero._optimizer_states_and_gradient_swap_out(group)


def _flat_partitions(zero: Any) -> list[Tensor]:
    """This rank's float32 part of each parameter group, in both of DeepSpeed's optimizers for ZeRO-1 and 2."""
    partitions: list[Tensor] = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    return partitions


def _number_dtype(value: Any) -> torch.dtype | None:
    """Python numbers are told from tensors by their width when they are read again."""
    return {int: torch.int64, float: torch.float64}.get(type(value))
