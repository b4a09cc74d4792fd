# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""What a memory and race checker says on a GPU, said on a CPU: watches each access of a kernel that is interpreted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

_SEVERAL = -1


class MemoryGuardError(AssertionError):
    """A kernel touched what it must not; Triton's InterpreterError carries its text."""


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Within it, an interpreted kernel fails if it reaches outside of its tensors or races with itself.

    Each address that a load, store or atomic does not mask out has to be an element of the tensor whose pointer it was
    computed from, not of its neighbour nor of a gap between its rows. The programs of a launch run in any order on a
    GPU, so none may store what another loads or stores; atomics may meet atomics. A program's own threads run in any
    order too: what it stores, it may load after `tl.debug_barrier()` only, and no two of its elements may be stored to
    one address unless they are equal.

    What nobody wrote is not seen here: `kernels.testing.poisoned_memory` makes that NaN.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier
    atomic, compare_and_swap, set_grid_idx = builder.create_atomic_rmw, builder.create_atomic_cas, builder.set_grid_idx
    init_args, implicit_cvt = executor._init_args_hst, interpreter._implicit_cvt
    moving = {name: getattr(builder, name) for name in _POINTER_OPERATIONS}
    memory = _Memory()

    def guarded_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        memory.load(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        memory.store(pointers, value, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def guarded_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.atomic(pointers, mask.data)
        return atomic(self, operation, pointers, value, mask, *rest)

    def guarded_swap(self: Any, pointers: Any, *rest: Any) -> Any:
        memory.atomic(pointers, True)
        return compare_and_swap(self, pointers, *rest)

    def guarded_barrier(self: Any) -> Any:
        memory.time += 1
        return barrier(self)

    def guarded_set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        memory.start((x, y, z))
        set_grid_idx(self, x, y, z)

    def guarded_init_args(self: Any, args: Any, kwargs: Any) -> Any:
        memory.__init__()  # type: ignore[misc]
        return init_args(self, args, kwargs)

    def watched(argument: Any) -> Any:
        converted = implicit_cvt(argument)
        if isinstance(argument, torch.Tensor) or hasattr(argument, "data_ptr"):
            tensor = argument if isinstance(argument, torch.Tensor) else argument.base
            converted.handle.attr[_OF] = memory.watch(tensor)
        return converted

    try:
        builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
        builder.create_atomic_rmw, builder.create_atomic_cas = guarded_atomic, guarded_swap
        builder.create_barrier, builder.set_grid_idx = guarded_barrier, guarded_set_grid_idx
        executor._init_args_hst, interpreter._implicit_cvt = guarded_init_args, watched
        for name, operation in moving.items():
            setattr(builder, name, _remembering(operation))
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, builder.create_atomic_cas = atomic, compare_and_swap
        builder.create_barrier, builder.set_grid_idx = barrier, set_grid_idx
        executor._init_args_hst, interpreter._implicit_cvt = init_args, implicit_cvt
        for name, operation in moving.items():
            setattr(builder, name, operation)


_OF = "millrace.tensor"
_POINTER_OPERATIONS = (
    "create_addptr", "create_bitcast", "create_broadcast", "create_expand_dims", "create_reshape", "create_splat",
    "create_trans",
)  # fmt: skip


def _remembering(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, whose result remembers of which tensor its pointers are."""

    def remembered(self: Any, *arguments: Any, **named: Any) -> Any:
        result = operation(self, *arguments, **named)
        for argument in arguments:
            if isinstance(argument, interpreter.TensorHandle) and _OF in argument.attr:
                result.attr[_OF] = argument.attr[_OF]
        return result

    return remembered


class _Extent:
    """Where the elements of a tensor lie."""

    def __init__(self, tensor: torch.Tensor) -> None:
        steps = list(zip(tensor.shape, tensor.stride(), strict=True))
        reach = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
        self.width, self.first = tensor.element_size(), tensor.data_ptr()
        self.end = self.first + reach * self.width
        self.elements = np.zeros(reach, dtype=bool) if reach > tensor.numel() else None
        if self.elements is not None:
            np.lib.stride_tricks.as_strided(self.elements, tensor.shape, tensor.stride())[...] = True

    def holds(self, addresses: Any, width: int) -> Any:
        """Which of the addresses are of elements."""
        inside = (addresses >= self.first) & (addresses + width <= self.end)
        if self.elements is not None:
            inside[inside] = self.elements[(addresses[inside] - self.first) // self.width]
        return inside


class _Memory:
    """The tensors of one launch, and who loaded and stored each address: a program's number, 0 for none, or several."""

    def __init__(self) -> None:
        self.extents: list[_Extent] = []
        self.programs: list[tuple[int, ...]] = [()]
        self.time = 0
        self.starts: Any = None

    def watch(self, tensor: torch.Tensor) -> _Extent:
        self.extents.append(_Extent(tensor))
        return self.extents[-1]

    def start(self, program: tuple[int, ...]) -> None:
        self.programs.append(program)
        self.program, self.time = len(self.programs) - 1, self.time + 1

    def load(self, pointers: Any, mask: Any) -> None:
        at, _ = self._addresses("loads", pointers, mask.data)
        self._refuse(at, self.writer, "loads what program {other} stores")
        late = (self.writer[at] == self.program) & ~self.is_atomic[at] & (self.stored[at] == self.time)
        if late.any():
            self._fail("loads what it stored: other threads may not have done so yet. Put tl.debug_barrier() between")
        self._mark(self.reader, at)

    def store(self, pointers: Any, value: Any, mask: Any) -> None:
        at, chosen = self._addresses("stores", pointers, mask.data)
        values = np.broadcast_to(value.data, chosen.shape)[chosen]
        values = values.view(f"u{values.itemsize}")
        order = np.argsort(at, kind="stable")
        same = (np.diff(at[order]) == 0) & (values[order][1:] != values[order][:-1])
        if same.any():
            self._fail("stores different values to the same address")
        self._refuse(at, self.writer, "stores what program {other} stores too")
        self._refuse(at, self.reader, "stores what program {other} loads")
        self.writer[at], self.stored[at], self.is_atomic[at] = self.program, self.time, False

    def atomic(self, pointers: Any, mask: Any) -> None:
        at, _ = self._addresses("updates", pointers, mask)
        self._refuse(at[~self.is_atomic[at]], self.writer, "updates what program {other} stores")
        self._refuse(at, self.reader, "updates what program {other} loads")
        self._mark(self.writer, at)
        self.is_atomic[at] = True

    def _addresses(self, access: str, pointers: Any, mask: Any) -> tuple[Any, Any]:
        """Positions in the arrays below of what an access touches, and which of its elements do."""
        chosen = np.broadcast_to(mask, pointers.data.shape).astype(bool)
        touched = pointers.data[chosen].astype(np.int64)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(touched.shape, dtype=bool)
        for extent in [pointers.attr[_OF]] if _OF in pointers.attr else self.extents:
            inside |= extent.holds(touched, width)
        if not inside.all():
            self._fail(
                f"{access} {(~inside).sum()} of {touched.size} addresses outside of "
                + ("the tensor that they were computed from" if _OF in pointers.attr else "all tensors")
            )
        if self.starts is None:
            self._lay_out()
        region = np.searchsorted(self.starts, touched, side="right") - 1
        return touched - self.starts[region] + self.bases[region], chosen

    def _lay_out(self) -> None:
        """Arrays of one entry a byte of all tensors; pages that no kernel touches cost nothing."""
        regions: list[list[int]] = []
        for first, end in sorted((extent.first, extent.end) for extent in self.extents if extent.end > extent.first):
            if regions and first < regions[-1][1]:
                regions[-1][1] = max(end, regions[-1][1])
            else:
                regions.append([first, end])
        sizes = [end - first for first, end in regions]
        self.starts = np.array([first for first, _ in regions], dtype=np.int64)
        self.bases = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
        self.writer, self.reader, self.stored = (np.zeros(sum(sizes), dtype=np.int32) for _ in range(3))
        self.is_atomic = np.zeros(sum(sizes), dtype=bool)

    def _mark(self, who: Any, at: Any) -> None:
        before = who[at]
        who[at] = np.where((before == 0) | (before == self.program), self.program, _SEVERAL)

    def _refuse(self, at: Any, who: Any, reason: str) -> None:
        others = who[at]
        others = others[(others != 0) & (others != self.program)]
        if others.size:
            self._fail(reason.format(other=self.programs[others[0]] if others[0] != _SEVERAL else "(another)"))

    def _fail(self, reason: str) -> None:
        raise MemoryGuardError(f"program {self.programs[self.program]} {reason}")
