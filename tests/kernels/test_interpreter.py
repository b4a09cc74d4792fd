"""The mended interpreter computes what a GPU does, or refuses; collected under TRITON_INTERPRET=1 only."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from kernels import check

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def _round(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n).to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _cut_off(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty, fp_downcast_rounding="rtz"))


@triton.jit
def _fill(y_ptr, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.full((BLOCK,), VALUE, y_ptr.dtype.element_ty))


@triton.jit
def _fma(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


@triton.jit
def _add(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i))


@triton.jit
def _sum(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(y_ptr + tl.arange(0, M), tl.sum(x, 1))


@triton.jit
def _atomic(x_ptr, y_ptr):
    tl.atomic_add(y_ptr, tl.load(x_ptr))


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x * y)
    tl.store(out_ptr + 2 * N + i, tl.where(x > y, x, y))
    tl.store(out_ptr + 3 * N + i, -x)
    tl.store(out_ptr + 4 * N + i, tl.abs(x))


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i), input_precision=PRECISION))


def bfloat16(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def test_float32_is_rounded_to_the_nearest_even() -> None:
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, 1e-40, 0.0, torch.inf])
    x = torch.cat((ties, torch.randn(56, generator=torch.Generator().manual_seed(0))))
    y = torch.empty(64, dtype=torch.bfloat16)
    _round[(1,)](x, y, 64, BLOCK=64)
    assert torch.equal(y, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16])
def test_other_types_are_rounded_too(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, -3, 257, 259, 1025, 2047, 5]).to(dtype)
    y = torch.empty(8, dtype=torch.bfloat16)
    _round[(1,)](x, y, 8, BLOCK=8)
    assert torch.equal(y, x.bfloat16())


def test_arithmetic_is_on_values_not_on_bits() -> None:
    x, y = bfloat16(32), bfloat16(1, 32)[0]
    out = torch.empty(5, 32, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, out, N=32)
    assert torch.equal(out, torch.stack((x + y, x * y, torch.maximum(x, y), -x, x.abs())))


def products(a: Tensor, b: Tensor, precision: str | None = None) -> Tensor:
    c = torch.empty(a.shape)
    _product[(1,)](a, b, c, N=len(a), PRECISION=precision)
    return c


def errors_allowed(a: Tensor, b: Tensor, relative: float = 0.0) -> Tensor:
    """Sums of N products in float32, in any order: N - 1 roundings of at most the sum of the terms' sizes."""
    return ((len(a) - 1) * torch.finfo(torch.float32).eps + relative) * (a.double().abs() @ b.double().abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, *FLOAT8])
def test_products_are_of_values_and_add_up_in_float32(dtype: torch.dtype) -> None:
    a, b = (torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).abs() * 100).to(dtype).unbind()
    exact = a.double() @ b.double()  # beyond float16's largest number in places, were it added up in it
    error = (products(a, b, "ieee").double() - exact).abs()
    assert (error <= errors_allowed(a, b)).all()


def test_tf32_reads_10_bits_of_the_fraction() -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    exact = a.double() @ b.double()
    # what is cut off is less than 2^-10 of each factor
    assert ((products(a, b).double() - exact).abs() <= errors_allowed(a, b, 2.01 * 2**-10)).all()
    assert ((products(a, b).double() - exact).abs() > errors_allowed(a, b)).any()
    # of each factor 2^-20 is left out; so is the product of two parts of less than 2^-10
    assert ((products(a, b, "tf32x3").double() - exact).abs() <= errors_allowed(a, b, 3.01 * 2**-20)).all()
    assert not torch.equal(products(a, b, "tf32x3"), products(a, b, "ieee"))
    one_more = torch.eye(16) * (1 + 2**-10 + 2**-11)
    assert torch.equal(products(one_more, torch.eye(16)), torch.eye(16) * (1 + 2**-10))


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _round[(1,)](x, y, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return y


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_8_bit_floats_round_to_the_nearest_even_and_saturate(dtype: torch.dtype, source: torch.dtype) -> None:
    known = torch.arange(256, dtype=torch.uint8).view(dtype)  # every one there is
    finite = known[known.float().isfinite()].float().unique()
    between = (finite[1:] + finite[:-1]) / 2  # ties
    x = torch.cat((finite, between, between * 1.01, between * 0.99)).to(source)
    assert torch.equal(converted(x, dtype).float(), x.to(dtype).float())
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([1.01 * largest, -2 * largest, torch.inf, -torch.inf, torch.nan]).to(source)
    expected = torch.tensor([largest, -largest, largest, -largest, torch.nan])
    assert torch.equal(converted(beyond, dtype).float().nan_to_num(), expected.nan_to_num())
    assert converted(beyond, dtype)[4].isnan()


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_8_bit_floats_are_widened_exactly(dtype: torch.dtype, target: torch.dtype) -> None:
    known = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(converted(known, target).nan_to_num(), known.to(target).nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_what_asks_for_it_is_cut_off(dtype: torch.dtype) -> None:
    x = torch.tensor([1.99, -1.99, 1.0, 0.0, 1e-3, 7e4, -1e-41, 300.7])
    y = torch.empty(8, dtype=dtype)
    _cut_off[(1,)](x, y, BLOCK=8)
    grid = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32).to(
        {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    )
    numbers = grid.view(dtype).double()
    for value, cut in zip(x.double(), y.double(), strict=True):
        below = numbers[(numbers.abs() <= value.abs()) & (numbers * value >= 0)]
        assert cut == below[below.abs().argmax()]


@pytest.mark.parametrize("dtype", [torch.bfloat16] + FLOAT8 * (triton.__version__ >= "3.7"))  # 3.6 compiles none
def test_constants_are_rounded(dtype: torch.dtype) -> None:
    y = torch.empty(4, dtype=dtype)
    _fill[(1,)](y, VALUE=1.7, BLOCK=4)
    assert torch.equal(y.float(), torch.full((4,), 1.7).to(dtype).float())


def test_fused_products_of_bfloat16() -> None:
    x, y, z, out = *bfloat16(3, 32).unbind(), torch.empty(32, dtype=torch.bfloat16)
    _fma[(1,)](x, y, z, out, BLOCK=32)
    assert torch.equal(out, (x.float() * y.float() + z.float()).bfloat16())


@pytest.mark.parametrize("dtype", FLOAT8)
def test_what_does_not_compile_is_refused(dtype: torch.dtype) -> None:
    x = torch.ones(4).to(dtype)
    with pytest.raises(InterpreterError, match=r"arithmetic on fp8e.* does not compile: convert it first"):
        _add[(1,)](x, x.clone(), BLOCK=4)


def test_bfloat16_atomics_are_refused() -> None:
    with pytest.raises(InterpreterError):
        _atomic[(1,)](torch.ones(1).bfloat16(), torch.ones(1).bfloat16())


def test_sums_of_float16_round_at_every_addition() -> None:
    row = torch.tensor([2048.0, -2048.0, 1.0, 0.0]).repeat_interleave(4)
    y = torch.empty(2).half()
    _sum[(1,)](row.repeat(2, 1).half(), y, M=2, N=16)  # the first addition puts each 1 on a 2048, and loses it
    assert torch.equal(y, torch.zeros(2).half())


def test_nothing_is_compiled_here(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        check.main([])
    assert "TRITON_INTERPRET=1 interprets kernels instead of compiling them. Unset it." in capsys.readouterr().err
