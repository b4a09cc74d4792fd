"""The memory guard sees what a GPU's memory checker would; collected under TRITON_INTERPRET=1 only."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from kernels.memory_guard import guarded_memory
from kernels.testing import assert_close_to_truth, poisoned_memory


@triton.jit
def _copy(x_ptr, y_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < (n if MASK_LOAD else n + BLOCK), other=0.0)
    tl.store(y_ptr + i, x, mask=i < (n if MASK_STORE else n + BLOCK))


@triton.jit
def _count(total_ptr):
    tl.atomic_add(total_ptr + tl.program_id(0) // 2, 1.0)


@triton.jit
def _shift(x_ptr, y_ptr, TO: tl.constexpr, FROM: tl.constexpr):
    program = tl.program_id(0)
    tl.store(y_ptr + program + TO, tl.load(x_ptr + program + FROM))


@triton.jit
def _count_then_shift(x_ptr, TO: tl.constexpr):
    program = tl.program_id(0)
    tl.atomic_add(x_ptr + program, 1.0)
    tl.store(x_ptr + (program + TO) % 4, 1.0)


@triton.jit
def _columns(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    program, columns = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(y_ptr + program * BLOCK + columns, tl.load(x_ptr + program * stride + columns))


@triton.jit
def _reverse(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + i, tl.load(x_ptr + BLOCK - 1 - i))


@triton.jit
def _scatter(x_ptr, y_ptr, at_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.load(at_ptr + i), tl.load(x_ptr + i))


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with guarded_memory():
        yield


def copy(x: torch.Tensor, y: torch.Tensor, step: int = 8, mask_load: bool = True, mask_store: bool = True) -> None:
    n = x.numel()
    _copy[(triton.cdiv(n, step),)](x, y, n, STEP=step, BLOCK=8, MASK_LOAD=mask_load, MASK_STORE=mask_store)


def test_a_sound_kernel_passes() -> None:
    x, y = torch.arange(13.0), torch.empty(13)
    copy(x, y)
    assert torch.equal(x, y)
    copy(x, x)  # in place, each program its own part
    assert torch.equal(x, y)


def test_reading_past_the_end_is_seen() -> None:
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) loads 3 of 8 addresses outside of the tensor"):
        copy(torch.zeros(13), torch.zeros(13), mask_load=False)


def test_writing_past_the_end_of_a_view_is_seen() -> None:
    storage = torch.zeros(64)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) stores 3 of 8 addresses outside of the tensor"):
        copy(torch.zeros(13), storage[:13], mask_store=False)
    assert not storage.any()


def test_reaching_into_another_tensor_of_the_launch_is_seen() -> None:
    x, y = torch.zeros(2, 16).unbind()  # y lies right behind x
    with pytest.raises(InterpreterError, match=r"program \(2, 0, 0\) loads 8 of 8 addresses outside of the tensor"):
        _copy[(3,)](x, y, 24, STEP=8, BLOCK=8, MASK_LOAD=True, MASK_STORE=True)


def test_gaps_between_rows_are_no_elements() -> None:
    storage, y = torch.zeros(4, 24), torch.empty(4, 8)
    _columns[(4,)](storage[:, :8], y, 24, BLOCK=8)
    _columns[(4,)](storage[0, :8].expand(4, 8), y, 0, BLOCK=8)
    with pytest.raises(InterpreterError, match=r"program \(0, 0, 0\) loads 1 of 8 addresses outside"):
        _columns[(4,)](storage[:, :7], y, 24, BLOCK=8)


def test_two_programs_that_store_to_one_address_are_seen() -> None:
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) stores what program \(0, 0, 0\) stores too"):
        copy(torch.zeros(16), torch.zeros(16), step=4)


def test_a_program_that_loads_what_another_stores_is_seen() -> None:
    x = torch.zeros(8)
    _shift[(4,)](x, x, TO=4, FROM=0)  # halves
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) loads what program \(0, 0, 0\) stores"):
        _shift[(4,)](x, x, TO=1, FROM=0)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) stores what program \(0, 0, 0\) loads"):
        _shift[(4,)](x, x, TO=0, FROM=1)  # the other order, in which nothing shows here


def test_a_program_that_loads_its_own_stores_needs_a_barrier() -> None:
    x = torch.zeros(8)
    with pytest.raises(InterpreterError, match=r"Put tl.debug_barrier\(\) between"):
        _reverse[(1,)](x, BARRIER=False, BLOCK=8)
    _reverse[(1,)](x, BARRIER=True, BLOCK=8)
    assert torch.equal(x, torch.arange(7.0, -1.0, -1.0))


def test_two_elements_at_one_address_are_seen_unless_they_are_equal() -> None:
    at, y = torch.tensor([0, 1, 1, 2]), torch.zeros(3)
    _scatter[(1,)](torch.tensor([1.0, torch.nan, torch.nan, 2.0]), y, at, BLOCK=4)
    with pytest.raises(InterpreterError, match="stores different values to the same address"):
        _scatter[(1,)](torch.arange(4.0), y, at, BLOCK=4)


def test_atomics_may_meet_but_neither_stores_nor_outside() -> None:
    total = torch.zeros(2)
    _count[(4,)](total)
    assert torch.equal(total, torch.tensor([2.0, 2.0]))
    with pytest.raises(InterpreterError, match=r"program .* updates 1 of 1 addresses outside"):
        _count[(6,)](total)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) updates what program \(0, 0, 0\) stores"):
        _count_then_shift[(2,)](torch.zeros(4), TO=1)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) stores what program \(0, 0, 0\) stores too"):
        _count_then_shift[(2,)](torch.zeros(4), TO=3)
    _count_then_shift[(2,)](torch.zeros(4), TO=2)
    _count_then_shift[(2,)](torch.zeros(4), TO=0)


def test_what_is_not_written_is_poison() -> None:
    x = torch.arange(16.0)
    with poisoned_memory():
        y = torch.empty(16)
    copy(x[:13], y[:13])
    with pytest.raises(AssertionError, match="3 of 16 elements are not finite"):
        assert_close_to_truth(y, x, x.double())
