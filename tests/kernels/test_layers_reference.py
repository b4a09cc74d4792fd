"""References of a decoder's layers are what torch, or the definition, computes; collected without interpreter only."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.glu import geglu, swiglu
from kernels.norm import add_layer_norm, add_rms_norm, layer_norm
from kernels.rotary import rotary

WIDE = [torch.float64, torch.float32]
NARROW = [torch.float16, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_is_torchs(dtype: torch.dtype, biased: bool) -> None:
    x, weight = normal(5, 33, dtype=dtype), normal(33, dtype=dtype)
    bias = normal(1, 33, dtype=dtype)[0] if biased else None
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (33,), weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", NARROW)
def test_layer_norm_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight = normal(5, 33, dtype=dtype), normal(33, dtype=dtype)
    y, truth = layer_norm(x, weight, None, 1e-5), reference.layer_norm(x.double(), weight.double(), None, 1e-5)
    # half a unit in the last place for the one rounding; float32 before it adds what a hundredth of that covers
    assert ((y.double() - truth).abs() <= 0.51 * torch.finfo(dtype).eps * truth.abs().clamp(min=2.0**-6)).all()


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
def test_what_is_normalized_is_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, weight = normal(5, 33, dtype=dtype), normal(1, 5, 33, dtype=dtype)[0], normal(33, dtype=dtype)
    total = x + residual
    for (y, carried), expected in (
        (add_rms_norm(x, residual, weight, 1e-5), reference.rms_norm(total, weight, 1e-5)),
        (add_layer_norm(x, residual, weight, weight, 1e-5), reference.layer_norm(total, weight, weight, 1e-5)),
    ):
        assert torch.equal(carried, total)
        assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (swiglu, lambda x: x / (1 + torch.exp(-x))),
        (lambda gate, up: geglu(gate, up, "none"), lambda x: x * torch.distributions.Normal(0.0, 1.0).cdf(x)),
        (geglu, lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    ],
    ids=["swiglu", "geglu", "geglu by tanh"],
)
def test_gates_are_as_defined(
    function: Callable[[Tensor, Tensor], Tensor], activation: Callable[[Tensor], Tensor]
) -> None:
    gate, up = 3 * normal(40, dtype=torch.float64), normal(1, 40, dtype=torch.float64)[0]
    torch.testing.assert_close(function(gate, up), activation(gate) * up, rtol=1e-12, atol=1e-15)


def test_pairs_turn_like_complex_numbers() -> None:
    q, k = normal(2, 4, 3, 10, dtype=torch.float64), normal(2, 2, 3, 10, dtype=torch.float64)
    angles = normal(1, 1, 3, 5, dtype=torch.float64)
    doubled = torch.cat((angles, angles), dim=-1)
    for turned, x in zip(rotary(q, k, doubled.cos(), doubled.sin()), (q, k), strict=True):
        expected = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1), rtol=1e-12, atol=1e-15)


def test_angles_in_float32_turn_narrow_heads() -> None:
    q, k = normal(2, 4, 3, 10).bfloat16(), normal(2, 2, 3, 10).bfloat16()
    angles = normal(1, 1, 3, 5).repeat(1, 1, 1, 2)
    turned = rotary(q, k, angles.cos(), angles.sin())
    assert [x.dtype for x in turned] == [torch.bfloat16] * 2
    narrow = rotary(q, k, angles.cos().bfloat16(), angles.sin().bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(turned, narrow, strict=True))
