"""The mended interpreter computes bfloat16 as torch does; collected under TRITON_INTERPRET=1 only."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import check


@triton.jit
def _round(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n).to(tl.bfloat16), mask=i < n)


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
def _product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


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


def test_products_are_of_values() -> None:
    a, b = bfloat16(16, 16), bfloat16(1, 16, 16)[0]
    c = torch.empty(16, 16)
    _product[(1,)](a, b, c, N=16)
    exact = a.double() @ b.double()
    # 16 products, exact in float32, added in any order: 15 roundings of at most the sum of magnitudes
    allowed = 15 * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs())
    assert ((c.double() - exact).abs() <= allowed).all()


def test_nothing_is_compiled_here(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        check.main([])
    assert "TRITON_INTERPRET=1 interprets kernels instead of compiling them. Unset it." in capsys.readouterr().err
