"""Layers of few bits: exact arithmetic where it is whole numbers, and no loss on the way to a file and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows.compression.int8 import sqnr_db
from flows.compression.quantized_linear import W4A16Linear, W8A8Linear, quantize_int4
from kernels import reference
from kernels.dispatch import KernelError
from kernels.int4_layout import unpack
from kernels.quantize import quantize_rows
from kernels.reference import FP8, INT8


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def w8a8(columns: int, channels: int, bias: bool = False, codes: torch.dtype = INT8) -> W8A8Linear:
    weight, scale = quantize_rows(normal(channels, columns), codes)
    return W8A8Linear(weight, scale[:, 0], torch.arange(channels).float() if bias else None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_int8_is_exact_integer_arithmetic(dtype, bias):
    layer = w8a8(48, 20, bias).to(dtype)
    x = normal(3, 5, 48, seed=2, dtype=dtype)
    numbers = x.numpy()
    largest, limit = np.abs(numbers).max(-1, keepdims=True), numbers.dtype.type(127)
    codes = np.rint(numbers * (limit / largest)).astype(np.int64)
    sums = codes @ layer.weight.numpy().astype(np.int64).T
    expected = sums.astype(numbers.dtype) * layer.weight_scale.numpy() * (largest / limit)
    if bias:
        expected = expected + layer.bias.numpy()
    assert np.array_equal(layer(x).numpy(), expected)


@pytest.mark.parametrize("codes", [INT8, FP8])
def test_a_row_does_not_depend_on_its_batch_mates(codes):
    layer = w8a8(64, 40, codes=codes)
    x = normal(33, 64, seed=3)
    x[7] *= 1e4  # would ruin a scale that rows share
    together = layer(x)
    rows = torch.cat([layer(x[row : row + 1]) for row in range(33)])
    if codes == INT8:
        assert torch.equal(rows, together)
    torch.testing.assert_close(rows, together)


def test_a_row_of_zeros_stays_zero():
    assert (w8a8(8, 4)(torch.zeros(2, 8)) == 0).all()


@pytest.mark.parametrize(("codes", "least_db"), [(INT8, 36.7), (FP8, 25.9)])
def test_w8a8_is_close_to_the_layer_it_was_made_from(codes, least_db):
    # INT8: both factors keep amax / 127 / sqrt(12) of noise at amax <= 4.5 sigma: 39.7 dB each at worst, 36.7 dB
    # together. E4M3: noise spread evenly over at most 2^-4 of each number, 28.9 dB each at worst, 25.9 dB together
    weight, x = normal(96, 256, seed=4), normal(50, 256, seed=5)
    stored, scale = quantize_rows(weight, codes)
    assert sqnr_db(x @ weight.T, W8A8Linear(stored, scale[:, 0])(x)) > least_db


@pytest.mark.parametrize("codes", [INT8, FP8])
def test_w8a8_from_file_is_the_same(tmp_path, codes):
    layer = w8a8(48, 20, True, codes)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    with torch.device("meta"):
        loaded = W8A8Linear(torch.empty(20, 48, dtype=codes), torch.empty(20), torch.empty(20))
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    x = normal(3, 48)
    assert torch.equal(loaded(x), layer(x))
    assert not list(loaded.parameters())


def test_casting_a_layer_keeps_its_codes():
    layer = w8a8(48, 20, codes=FP8)
    before = layer.weight.clone()
    assert layer.double().weight.dtype == FP8
    assert torch.equal(layer.weight.view(INT8), before.view(INT8))
    assert layer.weight_scale.dtype == layer(normal(3, 48).double()).dtype == torch.float64


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_codes_are_the_nearest(dtype, symmetric, group_size):
    weight = normal(7, 256, dtype=torch.float32).to(dtype)
    weight[:, 3] = weight[2] = 0
    codes, scales, zeros = quantize_int4(weight, group_size, symmetric)
    assert codes.max() <= 15
    centre = 8 if zeros is None else zeros.repeat_interleave(group_size, 1).double()
    step = scales.repeat_interleave(group_size, 1).double()
    restored = (codes.double() - centre) * step
    # half a step; at the ends what rounding a scale cuts off: its share of 15 steps, and half a step of a zero point
    slack = 16 * torch.finfo(dtype).eps + (0 if symmetric else 0.5)
    assert ((restored - weight.double()).abs() <= (0.5 + slack) * step).all()
    assert (restored[weight == 0] == 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_w4a16_is_its_weights_exactly(symmetric):
    weight, bias = normal(7, 192), normal(7, seed=2)
    layer = W4A16Linear.of(weight, bias, 64, symmetric)
    codes, scales, zeros = quantize_int4(weight, 64, symmetric)
    assert torch.equal(unpack(layer.packed, 192), codes)
    centre = 8 if zeros is None else zeros.repeat_interleave(64, 1).float()
    restored = (codes.float() - centre) * scales.repeat_interleave(64, 1)
    assert torch.equal(layer(torch.eye(192)), restored.t() + bias)
    assert sqnr_db(weight, restored) > 15  # amax <= 4 sigma in 7 steps: 12 x (7 / 4)^2 = 15.7 dB


@pytest.mark.parametrize("symmetric", [False, True])
def test_w4a16_from_file_is_the_same(tmp_path, symmetric):
    layer = W4A16Linear.of(normal(20, 96).bfloat16(), None, 32, symmetric)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert (tmp_path / "layer.safetensors").stat().st_size < 20 * 96 * 2 * 0.6  # a block of 128 columns for 96 here
    with torch.device("meta"):
        empty = torch.empty(3, 20, dtype=torch.uint8)
        loaded = W4A16Linear(torch.empty(20, 32, dtype=torch.int16), torch.empty(3, 20), None if symmetric else empty)
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    x = normal(3, 96).bfloat16()
    assert torch.equal(loaded(x), layer(x))
    assert torch.equal(layer(x), reference.w4a16_linear(x, layer.packed, layer.scales, layer.zeros, None))


def test_layers_heed_which_implementation_is_asked_for():
    layer = W4A16Linear.of(normal(8, 32).bfloat16(), None, 32, True, "triton")
    with pytest.raises(KernelError, match="run on CUDA, not on cpu"):
        layer(normal(1, 32).bfloat16())
    codes, scale = quantize_rows(normal(8, 32))
    with pytest.raises(KernelError, match="run on CUDA, not on cpu"):
        W8A8Linear(codes, scale[:, 0], kernels="triton")(normal(1, 32))
