"""Norm kernels, with and without a residual stream, against float64: on CUDA, or interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import norm, reference
from kernels.dispatch import INTERPRETED, KernelError
from kernels.norm import add_rms_norm, layer_norm, rms_norm
from kernels.testing import apart, assert_close_to_truth, padded, turned

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"]
SHAPES = [(1, 1), (3, 64), (2, 5, 100), (9, 1000), (5, 2100)]  # rows that share a program, do not, and loop
if not INTERPRETED:
    SHAPES += [(20000, 128), (1000, 4096), (70, 8192)]  # more rows than any GPU has processors
OFTEN = [(shape, torch.bfloat16) for shape in SHAPES] + [((2, 5, 100), dtype) for dtype in DTYPES[:2]]
SELDOM = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if (shape, dtype) not in OFTEN]


class Case(NamedTuple):
    """Tensors that have gradients, and what is handed down to the results."""

    inputs: dict[str, Tensor | None]
    handed: list[Tensor]

    def changed(self, change: Callable[[Tensor], Tensor]) -> Case:
        """With each tensor changed."""
        inputs = {name: None if tensor is None else change(tensor) for name, tensor in self.inputs.items()}
        return Case(inputs, [change(tensor) for tensor in self.handed])


def made(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, biased: bool = True) -> Case:
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    inputs: dict[str, Tensor | None] = {"x": 3 * normal(*shape), "weight": 1 + normal(shape[-1]) / 4}
    if "add" in kind:
        inputs["residual"] = 2 * normal(*shape) + 1
    if "layer" in kind:
        inputs["bias"] = normal(shape[-1]) if biased else None
    return Case(inputs, [normal(*shape) for _ in range(2 if "add" in kind else 1)])


def run(function: Callable[..., Any], case: Case) -> dict[str, Tensor]:
    """Results, and the gradient of every input."""
    inputs = case.changed(lambda tensor: tensor.detach().requires_grad_()).inputs
    results = function(**inputs, eps=EPS)
    results = [results] if isinstance(results, Tensor) else list(results)
    wanted = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    gradients = torch.autograd.grad(results, list(wanted.values()), case.handed)
    named = {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return {**dict(zip(("y", "total"), (result.detach() for result in results), strict=False)), **named}


def kernel(kind: str) -> Callable[..., Any]:
    return partial(getattr(norm, kind), kernels="triton")


def magnitudes(kind: str, case: Case) -> dict[str, Tensor]:
    """Sizes of the terms that add up to each element; those of `dx` cancel, all of them where D = 1."""
    inputs = {name: tensor.double() for name, tensor in case.inputs.items() if tensor is not None}
    dy, *dtotal = (tensor.double().abs() for tensor in case.handed)
    total = inputs["x"] + inputs.get("residual", 0.0)
    mean = total.mean(-1, keepdim=True) if "layer" in kind else torch.zeros_like(total[..., :1])
    rstd = torch.rsqrt((total - mean).square().mean(-1, keepdim=True) + EPS)
    normalized, scaled = (total.abs() + mean.abs()) * rstd, dy * inputs["weight"].abs()
    dx = rstd * (scaled + normalized * (scaled * normalized).mean(-1, keepdim=True))
    if "layer" in kind:
        dx = dx + rstd * scaled.mean(-1, keepdim=True)
    sizes = {"y": normalized * inputs["weight"].abs() + inputs.get("bias", torch.zeros(())).abs(), "total": total.abs()}
    sizes["dx"] = sizes["dresidual"] = dx + dtotal[0] if dtotal else dx
    return {**sizes, "dweight": (dy * normalized).flatten(0, -2).sum(0), "dbias": dy.flatten(0, -2).sum(0)}


def check(kind: str, case: Case, function: Callable[..., Any] | None = None) -> None:
    truth = run(getattr(reference, kind), case.changed(Tensor.double))
    plain = run(getattr(reference, kind), case)
    sizes = magnitudes(kind, case)
    actual = run(function or kernel(kind), case)
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        assert_close_to_truth(value, plain[name], truth[name], sizes[name])


@pytest.mark.parametrize(
    ("shape", "dtype"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in SELDOM)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(kind, made(kind, shape, dtype, device))


@pytest.mark.parametrize("kind", ["layer_norm", "add_layer_norm"])
def test_without_bias(kind: str, device: str) -> None:
    check(kind, made(kind, (5, 100), torch.bfloat16, device, biased=False))


@pytest.mark.parametrize(("kind", "dtype"), [("add_rms_norm", torch.float32), ("add_layer_norm", torch.bfloat16)])
def test_strided_inputs(kind: str, dtype: torch.dtype, device: str) -> None:
    case = made(kind, (6, 40), dtype, device)
    for arrange in (apart, padded, turned):
        check(kind, case.changed(arrange))
    check(kind, Case(case.inputs, [tensor[:1, :1].expand(6, 40) for tensor in case.handed]))  # as from a sum


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_rows(kind: str, device: str) -> None:
    scale = torch.tensor([[0.0], [1e-15], [1e15]], device=device)  # squares underflow, squares near the top
    case = made(kind, (3, 48), torch.float32, device)
    inputs = {name: scale * tensor if tensor.dim() == 2 else tensor for name, tensor in case.inputs.items()}
    check(kind, Case(inputs, case.handed))


@pytest.mark.parametrize("kind", KINDS[1::2])
def test_no_rows(kind: str, device: str) -> None:
    results = run(kernel(kind), made(kind, (0, 8), torch.float32, device))
    assert all(results[name].shape == (0, 8) for name in ("y", "total", "dx", "dresidual"))
    assert not any(results[name].any() for name in results if name in ("dweight", "dbias"))


@pytest.mark.parametrize("kind", KINDS[1::2])
def test_a_row_depends_on_no_other_and_bits_are_the_same_on_every_run(kind: str, device: str) -> None:
    case = made(kind, (13, 100), torch.float32, device)
    first, again = run(kernel(kind), case), run(kernel(kind), case)
    assert all(torch.equal(first[name], again[name]) for name in first)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0)).to(device)
    permuted = run(kernel(kind), case.changed(lambda tensor: tensor[order] if tensor.dim() == 2 else tensor))
    for name in ("y", "total", "dx", "dresidual"):
        assert torch.equal(permuted[name], first[name][order])


@pytest.mark.parametrize("kind", KINDS[1::2])
def test_what_is_normalized_is_the_rounded_sum(kind: str, device: str) -> None:
    inputs = made(kind, (4, 300), torch.bfloat16, device).inputs
    y, total = kernel(kind)(**inputs, eps=EPS)
    assert torch.equal(total, inputs.pop("x") + inputs.pop("residual"))
    assert torch.equal(y, kernel(kind.removeprefix("add_"))(total, **inputs, eps=EPS))


@pytest.mark.parametrize(("kind", "biased"), [("rms_norm", False), ("add_layer_norm", True)])
def test_registration(kind: str, biased: bool, device: str) -> None:
    case = made(kind, (5, 24), torch.bfloat16, device)
    x, residual, weight, bias = (case.inputs.get(name) for name in ("x", "residual", "weight", "bias"))
    forward = (x, residual, weight, bias, EPS, "layer" in kind)
    torch.library.opcheck(torch.ops.millrace.norm_fwd.default, forward)
    _, total, mean, rstd = torch.ops.millrace.norm_fwd(*forward)
    dtotal = None if residual is None else case.handed[1]
    backward = (case.handed[0], dtotal, total if total.numel() else x, weight, mean, rstd, biased)
    torch.library.opcheck(torch.ops.millrace.norm_bwd.default, backward)


@pytest.mark.parametrize("kind", ["add_rms_norm", pytest.param("layer_norm", marks=pytest.mark.exhaustive)])
def test_compiled(kind: str, device: str) -> None:
    compiled = torch.compile(kernel(kind), backend="aot_eager", fullgraph=True)
    check(kind, made(kind, (5, 24), torch.float32, device), compiled)


def test_what_is_not_used_hands_down_nothing(device: str) -> None:
    case = made("add_rms_norm", (3, 20), torch.float32, device)
    silent = [case.handed[0], torch.zeros_like(case.handed[1])]
    expected = run(kernel("add_rms_norm"), Case(case.inputs, silent))
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in case.inputs.items()}
    y, _ = add_rms_norm(**inputs, eps=EPS, kernels="triton")
    y.backward(case.handed[0])
    assert all(torch.equal(inputs[name].grad, expected[f"d{name}"]) for name in inputs)


def test_auto_runs_the_kernel_where_it_can(device: str) -> None:
    x, weight = (made("rms_norm", (3, 1000), torch.float32, device).inputs[name] for name in ("x", "weight"))
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x, weight, EPS, "triton"))
    x, weight = x.double(), weight.double()
    assert torch.equal(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


def test_what_cannot_be_is_refused(device: str) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(
        KernelError, match=r'"triton" is not possible: kernels take .*, not torch\.float64\. Use "auto"'
    ):
        rms_norm(x.double(), x[0].double(), EPS, "triton")
    with pytest.raises(KernelError, match=r"hold rows of up to 8192 columns in registers, not 8193"):
        rms_norm(torch.ones(1, 8193, device=device), torch.ones(8193, device=device), EPS, "triton")
    with pytest.raises(ValueError, match=r"weight has shape \[4\]; x of shape \[2, 8\] needs \[8\]"):
        rms_norm(x, x[0, :4], EPS, "triton")
    with pytest.raises(ValueError, match=r"bias has shape \[4\]; x of shape \[2, 8\] needs \[8\]"):
        layer_norm(x, x[0], x[0, :4], EPS, "triton")
    with pytest.raises(ValueError, match=r"residual is torch.float16 \[2, 8\]; x, .*, torch.float32 \[2, 8\]"):
        add_rms_norm(x, x.half(), x[0], EPS, "triton")
