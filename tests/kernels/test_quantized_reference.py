"""References of the low-bit operations on the CPU: bounds that hold for any numbers, exact sums, the packed layout."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from kernels import dispatch, launch_constants, reference
from kernels.dispatch import KernelError
from kernels.int4_layout import pack, unpack, unpack_words
from kernels.quantize import dequantize, quantize_groups, quantize_rows
from kernels.reference import FP8, INT8
from kernels.w8a8_linear import MAX_INT8_COLUMNS, w8a8_linear

finite = st.floats(-1e6, 1e6, width=32)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=finite)


@settings(max_examples=100, deadline=None)
@given(matrices)
def test_nothing_moves_by_more_than_half_a_step(values):
    x = torch.from_numpy(values)
    codes, scale = quantize_rows(x)
    # at most 127 steps, rounded to float32 twice; a scale rounded once
    bound = scale.double() / 2 * (1 + 127 * 2**-21)
    assert ((x.double() - codes.double() * scale.double()).abs() <= bound).all()
    codes, scale = quantize_rows(x, FP8)
    bound = torch.maximum(x.double().abs() / 16, scale.double() * 2**-10) * (1 + 2**-20)
    assert ((x.double() - codes.double() * scale.double()).abs() <= bound).all()


@settings(max_examples=100, deadline=None)
@given(matrices)
def test_codes_are_symmetric_and_zero_stays_zero(values):
    x = torch.from_numpy(values)
    x[:, 0] = 0
    for dtype in (INT8, FP8):
        codes, scale = quantize_rows(x, dtype)
        assert (dequantize(codes, scale)[x == 0] == 0).all()
        assert torch.equal(quantize_rows(-x, dtype)[0].float(), -codes.float())
        assert (scale > 0).all()  # nothing is divided by zero
    assert (quantize_rows(x)[0] != -128).all()


def test_the_largest_number_of_each_row_has_the_largest_code():
    x = torch.tensor([[0.5, -2.0, 1.0], [1e-5, 3e-5, -2e-5]])
    codes, _ = quantize_rows(x)
    assert codes.abs().amax(1).tolist() == [127, 127]
    assert codes[0].tolist() == [32, -127, 64]  # 31.75 and 63.5: nearest, ties to even
    assert quantize_rows(x, FP8)[0].float().abs().amax(1).tolist() == [448, 448]


def test_groups_are_rows_of_their_own():
    x = torch.randn(3, 4, 96, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_groups(x, 32)
    row_codes, row_scales = quantize_rows(x.view(3, 4, 3, 32))
    assert torch.equal(codes, row_codes.view(3, 4, 96))
    assert torch.equal(scales, row_scales[..., 0])


@pytest.mark.parametrize(("rows", "columns", "channels"), [(1, 1, 1), (3, 7, 5), (17, 40, 48), (128, 256, 96)])
def test_products_are_exact(rows, columns, channels):
    random = np.random.default_rng(0)
    a = random.integers(-127, 128, (rows, columns), dtype=np.int8)
    b = random.integers(-127, 128, (channels, columns), dtype=np.int8)
    found = reference.int8_product(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert np.array_equal(found, a.astype(np.int64) @ b.astype(np.int64).T)


def test_the_longest_row_of_extreme_codes_does_not_overflow():
    a, b = torch.full((1, MAX_INT8_COLUMNS), 127, dtype=INT8), torch.full((2, MAX_INT8_COLUMNS), -127, dtype=INT8)
    assert reference.int8_product(a, b).tolist() == [[-(127**2) * MAX_INT8_COLUMNS] * 2]
    assert 127**2 * (MAX_INT8_COLUMNS + 1) > 2**31 - 1


def codes(channels: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.randint(0, 16, (channels, columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("columns", [32, 96, 128, 160, 640])
def test_unpacking_undoes_packing(columns):
    packed = pack(codes(5, columns))
    assert packed.dtype == torch.int16
    assert packed.shape == (5, -(-columns // 128) * 32)
    assert torch.equal(unpack(packed, columns), codes(5, columns))


def test_the_packed_layout_is_the_documented_one():
    packed = pack(codes(3, 256)).numpy().astype(np.uint16)
    for place, column in ((0, 0), (0, 31), (1, 32), (2, 64), (3, 127), (3, 255), (1, 160)):
        word = column // 128 * 32 + column % 32
        assert np.array_equal(packed[:, word] >> 4 * place & 15, codes(3, 256)[:, column].numpy())


def in_words(codes: Tensor, dim: int) -> Tensor:
    """Eight neighbours in an int32, the first in its lowest bits, as GPTQ and compressed-tensors store them."""
    groups = codes.movedim(dim, -1).unflatten(-1, (-1, 8)).to(torch.int64)
    words = (groups << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim)


def test_public_layouts_convert_without_a_loss():
    expected = codes(24, 128)
    gptq, compressed_tensors = in_words(expected.t(), 0), in_words(expected, 1)
    assert (gptq.shape, compressed_tensors.shape) == ((16, 24), (24, 16))
    assert torch.equal(pack(unpack_words(gptq, 0).t()), pack(expected))
    assert torch.equal(pack(unpack_words(compressed_tensors, 1)), pack(expected))
    zeros = codes(4, 24)  # [K / G, N]
    assert torch.equal(unpack_words(in_words(zeros, 1), 1), zeros)  # GPTQ
    assert torch.equal(unpack_words(in_words(zeros.t(), 0), 0).t(), zeros)  # compressed-tensors


def test_8_bit_floats_need_a_gpu_that_has_them(monkeypatch):
    monkeypatch.setattr(dispatch, "compile_only", True)  # as if tensors were on a GPU
    monkeypatch.setattr(launch_constants, "architecture", lambda device: 80)
    x = torch.randn(2, 32)
    with pytest.raises(KernelError, match=r"8-bit floats need a GPU of sm_89 or newer, not sm_80\. Use"):
        quantize_rows(x, FP8, "triton")
    codes, scale = quantize_rows(x, FP8)  # auto: plain torch knows them anywhere
    linear = partial(w8a8_linear, codes, codes, scale, scale[:, 0])
    assert torch.equal(linear(), linear(kernels="reference"))
    for call in (linear, partial(dequantize, codes, scale)):
        with pytest.raises(KernelError, match="sm_89"):
            call(kernels="triton")
