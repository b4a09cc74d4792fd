from __future__ import annotations

import pytest
import torch

from flows.compression.int8 import Int8Embedding, sqnr_db
from kernels.quantize import dequantize, quantize_rows


def test_sqnr_is_signal_over_noise_in_decibels():
    x = torch.full((100,), 3.0)
    assert sqnr_db(x, x + 0.03) == pytest.approx(40.0, abs=1e-3)  # a noise amplitude of 1/100
    assert sqnr_db(x, x) == float("inf")
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == float("inf")


def test_embedding_returns_rows_in_the_dtype_of_its_scale():
    weight = torch.randn(10, 6, generator=torch.Generator().manual_seed(6))
    codes, scale = quantize_rows(weight)
    layer = Int8Embedding(codes, scale[:, 0])
    ids = torch.tensor([[3, 9], [0, 3]])
    assert torch.equal(layer(ids), dequantize(codes, scale)[ids])
    assert layer.double()(ids).dtype == torch.float64
    assert layer.weight.dtype == torch.int8
