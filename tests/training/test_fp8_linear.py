"""Products in fp8 are those of the rounded operands, forward and back, and rounding is the format's."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from flows.model.decoder import Decoder
from flows.training.fp8_linear import (
    BACKWARD,
    FORWARD,
    Fp8Linear,
    multiply_in_fp8,
    to_fp8,
    too_old,
    unavailable_reason,
)
from tests.training.conftest import TINY, VOCAB_SIZE

M, N, K = 32, 48, 16


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    x8, scale = to_fp8(x, dtype)
    return x8.double() * scale.double()


@pytest.mark.parametrize(("dtype", "bits"), [(FORWARD, 3), (BACKWARD, 2)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_rounding_is_that_of_the_format_whatever_the_size(dtype: torch.dtype, bits: int, size: float) -> None:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)) * size
    error = (widened(x, dtype) - x.double()).abs()
    largest = x.abs().max().double()
    smallest_step = torch.finfo(dtype).smallest_normal * 2.0**-bits / torch.finfo(dtype).max * largest
    # half a unit in the last place; float32's division is in the scale besides
    assert (error <= (2.0 ** -(bits + 1) + 2**-22) * x.double().abs() + smallest_step / 2).all()
    assert (widened(x, dtype).abs().max() - largest).abs() <= 2**-22 * largest
    assert error.max() > 0


def test_zeros_stay_zeros() -> None:
    x8, scale = to_fp8(torch.zeros(M, K), FORWARD)
    assert scale.isfinite()
    assert x8.float().eq(0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_rounded_operands(width: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(K, N, bias=bias).to(width)
    layer = Fp8Linear(plain)
    assert dict(layer.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert layer.weight is plain.weight
    x = torch.randn(2, M // 2, K, generator=generator).to(width).requires_grad_()
    upstream = torch.randn(2, M // 2, N, generator=generator).to(width)
    y = layer(x)
    y.backward(upstream)

    x8, weight8 = widened(x.flatten(0, 1), FORWARD), widened(layer.weight, FORWARD)
    upstream8 = widened(upstream.flatten(0, 1), BACKWARD)
    expected = {
        "y": (y, x8 @ weight8.t(), x8.abs() @ weight8.abs().t()),
        "for x": (x.grad, upstream8 @ weight8, upstream8.abs() @ weight8.abs()),
        "for weight": (layer.weight.grad, upstream8.t() @ x8, upstream8.abs().t() @ x8.abs()),
    }
    if bias:
        expected["y"] = (expected["y"][0], expected["y"][1] + plain.bias.double(), expected["y"][2])
        assert torch.equal(layer.bias.grad, upstream.sum((0, 1)))
    for name, (found, truth, magnitude) in expected.items():
        assert found is not None
        # results rounded once or, with a bias, twice; sums in float32, or in the result's type at worst
        allowed = 3 * torch.finfo(width).eps * magnitude + 2**-20 * magnitude
        assert (found.flatten(0, -2).double() - truth).abs().le(allowed).all(), name

    assert torch.equal(layer.eval()(x), plain(x)), "what is saved is evaluated as it is"


def test_hardware_without_fp8_is_named() -> None:
    assert re.match(
        r"it needs a GPU of compute capability 8.9 or higher .*, and NVIDIA A100 has 8.0",
        str(too_old("NVIDIA A100", (8, 0))),
    )
    assert too_old("NVIDIA H100", (9, 0)) is None
    assert "this run is on the processor" in str(unavailable_reason("cpu"))


def test_all_layers_of_the_blocks_multiply_in_fp8_and_nothing_else() -> None:
    model = Decoder(TINY, VOCAB_SIZE)
    names = dict(model.named_parameters()).keys()
    multiply_in_fp8(model, "cpu")
    assert dict(model.named_parameters()).keys() == names
    found = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear - found == {"lm_head"}
    assert len(found) == 7 * TINY.num_hidden_layers
