from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from flows.compression.int8 import (
    MAX_COLUMNS,
    Int8Embedding,
    Int8Linear,
    choose_scale,
    dequantize,
    exact_product,
    quantize,
    sqnr_db,
)

finite = st.floats(-1e6, 1e6, width=32)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=finite)


@settings(max_examples=100, deadline=None)
@given(matrices)
def test_nothing_moves_by_more_than_half_a_step(values):
    x = torch.from_numpy(values)
    scale = choose_scale(x)
    restored = dequantize(quantize(x, scale), scale).double()
    # x / scale rounds at most 127 to float32: 2^-24 x 127 of a step each for the division and the product, doubled
    bound = scale.double() / 2 * (1 + 127 * 2**-21)
    assert ((x.double() - restored).abs() <= bound).all()


@settings(max_examples=100, deadline=None)
@given(matrices)
def test_codes_are_symmetric_and_zero_stays_zero(values):
    x = torch.from_numpy(values)
    x[:, 0] = 0
    codes = quantize(x, choose_scale(x))
    assert (codes[x == 0] == 0).all()
    assert (codes != -128).all()
    assert torch.equal(quantize(-x, choose_scale(-x)), -codes)


def test_largest_value_of_each_row_is_code_127():
    x = torch.tensor([[0.5, -2.0, 1.0], [1e-5, 3e-5, -2e-5]])
    codes = quantize(x, choose_scale(x))
    assert codes.abs().amax(1).tolist() == [127, 127]
    assert codes[0].tolist() == [32, -127, 64]  # 31.75 and 63.5: nearest, ties to even


def test_sqnr_is_signal_over_noise_in_decibels():
    x = torch.full((100,), 3.0)
    assert sqnr_db(x, x + 0.03) == pytest.approx(40.0, abs=1e-3)  # a noise amplitude of 1/100
    assert sqnr_db(x, x) == float("inf")
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == float("inf")


@pytest.mark.parametrize(("rows", "columns", "channels"), [(1, 1, 1), (3, 7, 5), (17, 40, 48), (128, 256, 96)])
def test_products_are_exact(rows, columns, channels):
    random = np.random.default_rng(0)
    a = random.integers(-127, 128, (rows, columns), dtype=np.int8)
    b = random.integers(-127, 128, (channels, columns), dtype=np.int8)
    found = exact_product(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert np.array_equal(found, a.astype(np.int64) @ b.astype(np.int64).T)


def test_the_longest_row_of_extreme_codes_does_not_overflow():
    a, b = torch.full((1, MAX_COLUMNS), 127, dtype=torch.int8), torch.full((2, MAX_COLUMNS), -127, dtype=torch.int8)
    assert exact_product(a, b).tolist() == [[-(127**2) * MAX_COLUMNS] * 2]
    assert 127**2 * (MAX_COLUMNS + 1) > 2**31 - 1


def int8_linear(columns: int, channels: int, bias: bool = False) -> Int8Linear:
    weight = torch.randn(channels, columns, generator=torch.Generator().manual_seed(1))
    scale = choose_scale(weight)
    return Int8Linear(quantize(weight, scale), scale[:, 0], torch.arange(channels).float() if bias else None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_is_exact_integer_arithmetic(dtype, bias):
    layer = int8_linear(48, 20, bias).to(dtype)
    x = torch.randn(3, 5, 48, dtype=dtype, generator=torch.Generator().manual_seed(2))
    numbers = x.numpy()
    scale = (np.abs(numbers).max(-1, keepdims=True) / numbers.dtype.type(127)).astype(numbers.dtype)
    codes = np.rint(numbers / scale).astype(np.int64)
    sums = codes @ layer.weight.numpy().astype(np.int64).T
    expected = sums.astype(numbers.dtype) * layer.weight_scale.numpy() * scale
    if bias:
        expected = expected + layer.bias.numpy()
    assert np.array_equal(layer(x).numpy(), expected)


def test_a_row_does_not_depend_on_its_batch_mates():
    layer = int8_linear(64, 40)
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(3))
    x[7] *= 1e4  # would ruin a scale that rows share
    together = layer(x)
    assert all(torch.equal(layer(x[row : row + 1]), together[row : row + 1]) for row in range(33))


def test_a_row_of_zeros_stays_zero():
    assert (choose_scale(torch.zeros(2, 8)) > 0).all()  # nothing is divided by zero
    assert (int8_linear(8, 4)(torch.zeros(2, 8)) == 0).all()


def test_linear_is_close_to_the_layer_it_was_made_from():
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(4))
    scale = choose_scale(weight)
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(5))
    found = Int8Linear(quantize(weight, scale), scale[:, 0])(x)
    # both factors keep amax / 127 / sqrt(12) of noise at amax <= 4.5 sigma: 39.7 dB each at worst, 36.7 dB together
    assert sqnr_db(x @ weight.T, found) > 36.7


def test_embedding_returns_rows_in_the_dtype_of_its_scale():
    weight = torch.randn(10, 6, generator=torch.Generator().manual_seed(6))
    scale = choose_scale(weight)
    layer = Int8Embedding(quantize(weight, scale), scale[:, 0])
    ids = torch.tensor([[3, 9], [0, 3]])
    assert torch.equal(layer(ids), dequantize(layer.weight, scale)[ids])
    assert layer.double()(ids).dtype == torch.float64
    assert layer.weight.dtype == torch.int8
