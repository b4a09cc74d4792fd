# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""What a memory checker says on a GPU, said on a CPU: watches each access of a kernel that Triton interprets."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from kernels import within_reach


class MemoryGuardError(AssertionError):
    """A kernel touched what it must not; Triton's InterpreterError carries its text."""


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Within it, an interpreted kernel fails if it reaches outside of its tensors or races with itself.

    Each address that a load, store or atomic does not mask out has to lie inside a tensor passed to the launch or said
    to be `within_reach`, within what its shape and strides reach. No address may be stored by two programs: on a GPU,
    either could be last.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    set_grid_idx, init_args = builder.set_grid_idx, executor._init_args_hst
    extents: list[tuple[int, int]] = []
    writers: dict[int, tuple[int, ...]] = {}
    program: tuple[int, ...] = ()

    def addresses(access: str, pointers: Any, mask: Any) -> Any:
        touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(touched.shape, dtype=bool)
        for first, end in extents:
            inside |= (touched >= first) & (touched + width <= end)
        if not inside.all():
            raise MemoryGuardError(
                f"{access} of program {program}: {(~inside).sum()} of {touched.size} addresses are in no tensor"
            )
        return touched

    def guarded_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for address in addresses("store", pointers, mask).tolist():
            writer = writers.setdefault(address, program)
            if writer != program:
                raise MemoryGuardError(f"programs {writer} and {program} store to the same address")
        return store(self, pointers, value, mask, *rest)

    def guarded_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses("atomic", pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def guarded_set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        nonlocal program
        program = (x, y, z)
        set_grid_idx(self, x, y, z)

    def guarded_init_args(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = init_args(self, args, kwargs)
        writers.clear()
        tensors = [value for value in (*on_host[0], *on_host[1].values()) if isinstance(value, torch.Tensor)]
        extents[:] = [_extent(tensor) for tensor in (*tensors, *within_reach.tensors) if tensor.numel()]
        return on_host

    try:
        builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
        builder.create_atomic_rmw, builder.set_grid_idx = guarded_atomic, guarded_set_grid_idx
        executor._init_args_hst = guarded_init_args
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, builder.set_grid_idx = atomic, set_grid_idx
        executor._init_args_hst = init_args


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of the tensor and the one behind its last, as far as this view reaches."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
