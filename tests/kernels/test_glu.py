"""Gated linear unit kernels against float64: on CUDA, or interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import INTERPRETED, MAX_COLUMNS, KernelError
from kernels.glu import geglu, swiglu
from kernels.testing import assert_close_to_truth

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; 1 / (1 + inf) = 0 is meant
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Gate = Callable[[Tensor, Tensor], Tensor]
KERNELS: dict[str, Gate] = {
    "silu": partial(swiglu, kernels="triton"),
    "gelu_tanh": partial(geglu, kernels="triton"),
    "gelu": partial(geglu, approximate="none", kernels="triton"),
}
REFERENCES: dict[str, Gate] = {
    "silu": reference.swiglu,
    "gelu_tanh": partial(reference.geglu, approximate="tanh"),
    "gelu": partial(reference.geglu, approximate="none"),
}
SHAPES = [(1, 1), (3, 7, 33), (2, 2500), (5, 1024)]  # many rows to a program, several programs to a row
if not INTERPRETED:
    SHAPES += [(1000, 14336)]
OFTEN = [(shape, torch.bfloat16) for shape in SHAPES] + [((3, 7, 33), dtype) for dtype in DTYPES[:2]]
SELDOM = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if (shape, dtype) not in OFTEN]


class Case(NamedTuple):
    gate: Tensor
    up: Tensor
    dy: Tensor


def made(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return Case(4 * gate, up, dy)


def run(function: Gate, case: Case) -> Case:
    """The result, and the gradients of gate and up."""
    gate, up = case.gate.detach().requires_grad_(), case.up.detach().requires_grad_()
    y = function(gate, up)
    return Case(y.detach(), *torch.autograd.grad(y, (gate, up), case.dy))


def check(kind: str, case: Case, function: Gate | None = None) -> None:
    truth = run(REFERENCES[kind], Case(*(tensor.double() for tensor in case)))
    gate, up, dy = (tensor.double().abs() for tensor in case)
    sizes = Case(gate * up, dy * up * (1 + gate), dy * gate)  # 1 + erf, and terms of the slope, cancel on the left
    for results in zip(run(function or KERNELS[kind], case), run(REFERENCES[kind], case), truth, sizes, strict=True):
        assert_close_to_truth(*results)


@pytest.mark.parametrize(
    ("shape", "dtype"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in SELDOM)]
)
@pytest.mark.parametrize("kind", KERNELS)
def test_forward_and_gradients(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(kind, made(shape, dtype, device))


@pytest.mark.parametrize("kind", KERNELS)
def test_far_from_zero(kind: str, device: str) -> None:
    gate = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 12.0, -12.0, 90.0, -90.0, 1e4, -1e4]], device=device)
    check(kind, Case(gate, torch.full_like(gate, 1.5), torch.ones_like(gate)))


def test_strided_inputs(device: str) -> None:
    case = made((6, 40), torch.bfloat16, device)
    both = torch.cat((case.gate, case.up), dim=-1)  # one projection for both
    halves = Case(both[:, :40], both[:, 40:], case.dy.t().contiguous().t())
    assert not any(tensor.is_contiguous() for tensor in halves)
    check("silu", halves)
    check("silu", Case(both[:, ::2], both[:, 1::2], case.dy[:1, :1].expand(6, 40)))


def test_no_elements(device: str) -> None:
    results = run(KERNELS["silu"], made((0, 8), torch.float32, device))
    assert all(result.shape == (0, 8) for result in results)


def test_bits_are_the_same_on_every_run_and_whatever_lies_beside(device: str) -> None:
    case = made((7, 300), torch.bfloat16, device)
    first, again = run(KERNELS["silu"], case), run(KERNELS["silu"], case)
    part = run(KERNELS["silu"], Case(*(tensor[2:5, 20:90] for tensor in case)))
    for one, other, piece in zip(first, again, part, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[2:5, 20:90], piece)


def test_inputs_and_gradients_stay_as_they_were(device: str) -> None:
    case = made((3, 50), torch.float32, device)
    before = Case(*(tensor.clone() for tensor in case))
    run(KERNELS["silu"], case)
    assert all(torch.equal(tensor, old) for tensor, old in zip(case, before, strict=True))


def test_registration(device: str) -> None:
    case = made((5, 24), torch.bfloat16, device)
    torch.library.opcheck(torch.ops.millrace.glu_fwd.default, (case.gate, case.up, "silu"))
    torch.library.opcheck(torch.ops.millrace.glu_bwd.default, (case.dy, case.gate, case.up, "gelu"))


@pytest.mark.exhaustive
def test_compiled(device: str) -> None:
    compiled = torch.compile(KERNELS["silu"], backend="aot_eager", fullgraph=True)
    check("silu", made((2, 3, 24), torch.float32, device), compiled)


def test_any_width_runs_the_kernel(device: str) -> None:
    case = made((1, MAX_COLUMNS + 9), torch.float32, device)
    assert torch.equal(swiglu(case.gate, case.up), KERNELS["silu"](case.gate, case.up))


def test_what_cannot_be_is_refused(device: str) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(KernelError, match=r'"triton" is not possible: kernels take .*, not torch\.float64'):
        swiglu(x.double(), x.double(), "triton")
    with pytest.raises(ValueError, match=r"up has shape \[8\]; gate, .*, \[2, 8\]"):
        swiglu(x, x[0], "triton")
    with pytest.raises(ValueError, match=r"approximate='sigmoid' is not a GELU. Use \"tanh\" or \"none\"."):
        geglu(x, x, "sigmoid")
