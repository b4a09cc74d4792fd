"""The reference is what torch itself computes, and rounds once."""

import pytest
import torch

from kernels import reference
from kernels.testing import assert_close_to_truth

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(7, 129, generator=generator, dtype=torch.float64)
    weight = 1 + torch.randn(129, generator=generator, dtype=torch.float64) / 4
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch(dtype: torch.dtype) -> None:
    x, weight = inputs(dtype)
    ours, theirs = reference.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (129,), weight, 1e-5)
    dy = torch.ones_like(ours)
    truth_x, truth_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    truth = torch.nn.functional.rms_norm(truth_x, (129,), truth_weight, 1e-5)
    assert_close_to_truth(ours.detach(), theirs.detach(), truth.detach())
    gradients = [
        torch.autograd.grad(y, wanted, dy.to(y.dtype))
        for y, wanted in ((ours, (x, weight)), (theirs, (x, weight)), (truth, (truth_x, truth_weight)))
    ]
    for one in zip(*gradients, strict=True):
        assert_close_to_truth(*one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_rounded_once(dtype: torch.dtype) -> None:
    x, weight = (tensor.detach() for tensor in inputs(dtype))
    y, truth = reference.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5)
    # half a unit in the last place for the one rounding; float32 before it adds what a thousandth of that covers
    assert ((y.double() - truth).abs() <= 0.501 * torch.finfo(dtype).eps * truth.abs()).all()
