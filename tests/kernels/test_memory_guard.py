"""The memory guard sees what a GPU's memory checker would; collected under TRITON_INTERPRET=1 only."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from kernels.memory_guard import guarded_memory
from kernels.testing import assert_close_to_truth, poisoned_memory
from kernels.within_reach import reaching


@triton.jit
def _copy(x_ptr, y_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < (n if MASK_LOAD else n + BLOCK), other=0.0)
    tl.store(y_ptr + i, x, mask=i < (n if MASK_STORE else n + BLOCK))


@triton.jit
def _count(total_ptr):
    tl.atomic_add(total_ptr + tl.program_id(0) // 2, 1.0)


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


def test_reading_past_the_end_is_seen() -> None:
    with pytest.raises(InterpreterError, match=r"load of program \(1, 0, 0\): 3 of 8 addresses are in no tensor"):
        copy(torch.zeros(13), torch.zeros(13), mask_load=False)


def test_writing_past_the_end_of_a_view_is_seen() -> None:
    storage = torch.zeros(64)
    with pytest.raises(InterpreterError, match=r"store of program \(1, 0, 0\): 3 of 8 addresses are in no tensor"):
        copy(torch.zeros(13), storage[:13], mask_store=False)
    assert not storage.any()


def test_two_programs_that_store_to_one_address_are_seen() -> None:
    with pytest.raises(InterpreterError, match=r"programs \(0, 0, 0\) and \(1, 0, 0\) store to the same address"):
        copy(torch.zeros(16), torch.zeros(16), step=4)


@triton.jit
def _copy_by_address(table_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x_ptr, y_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32)), tl.load(table_ptr + 1)
    tl.store(y_ptr.to(tl.pointer_type(tl.float32)) + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


def test_tables_of_addresses_reach_what_they_are_said_to() -> None:
    x, y = torch.arange(13.0), torch.zeros(14)
    table = torch.tensor([x.data_ptr(), y.data_ptr()])
    with reaching([x], [y]):
        _copy_by_address[(1,)](table, 13, BLOCK=16)
    assert torch.equal(x, y[:13])
    with reaching([x], [y]), pytest.raises(InterpreterError, match="1 of 14 addresses are in no tensor"):
        _copy_by_address[(1,)](table, 14, BLOCK=16)
    with pytest.raises(InterpreterError, match="13 of 13 addresses are in no tensor"):
        _copy_by_address[(1,)](table, 13, BLOCK=16)


def test_atomics_may_meet_but_not_outside() -> None:
    total = torch.zeros(2)
    _count[(4,)](total)
    assert torch.equal(total, torch.tensor([2.0, 2.0]))
    with pytest.raises(InterpreterError, match="atomic of program"):
        _count[(6,)](total)


def test_what_is_not_written_is_poison() -> None:
    x = torch.arange(16.0)
    with poisoned_memory():
        y = torch.empty(16)
    copy(x[:13], y[:13])
    with pytest.raises(AssertionError, match="3 of 16 elements are not finite"):
        assert_close_to_truth(y, x, x.double())
