"""The RMS norm kernel against float64: on CUDA, or interpreted on the CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flows.config.model import Kernels, ModelConfig
from flows.model.decoder import Decoder, initialize
from kernels import reference
from kernels.dispatch import INTERPRETED, KernelError
from kernels.rms_norm import rms_norm
from kernels.testing import assert_close_to_truth

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 33), (3, 64), (2, 5, 100), (9, 1000)]  # 9 rows: more than one for each interpreted program
if not INTERPRETED:
    SHAPES += [(1000, 4096), (70, 8192)]  # more rows than any GPU has processors


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    dy: Tensor


class Results(NamedTuple):
    y: Tensor
    dx: Tensor
    dweight: Tensor


def made(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    return Case(3 * normal(*shape), 1 + normal(shape[-1]) / 4, normal(*shape))


def run(norm: Callable[[Tensor, Tensor, float], Tensor], case: Case) -> Results:
    x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
    y = norm(x, weight, EPS)
    return Results(y.detach(), *torch.autograd.grad(y, (x, weight), case.dy))


def kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight, eps, "triton")


def magnitudes(case: Case) -> Results:
    """Sizes of the terms that add up to each element; those of `dx` cancel, all of them where D = 1."""
    x, weight, dy = (tensor.double().abs() for tensor in case)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    normalized, scaled = x * rstd, dy * weight
    dx = rstd * (scaled + normalized * (scaled * normalized).mean(-1, keepdim=True))
    return Results(normalized * weight, dx, (dy * normalized).flatten(0, -2).sum(0))


def check(case: Case, norm: Callable[[Tensor, Tensor, float], Tensor] = kernel) -> None:
    truth = run(reference.rms_norm, Case(*(tensor.double() for tensor in case)))
    plain = run(reference.rms_norm, case)
    for actual, achieved, exact, terms in zip(run(norm, case), plain, truth, magnitudes(case), strict=True):
        assert_close_to_truth(actual, achieved, exact, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(made(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype: torch.dtype, device: str) -> None:
    def apart(tensor: Tensor) -> Tensor:  # every second element
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., 0]

    def padded(tensor: Tensor) -> Tensor:  # rows lie apart
        return torch.cat((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., : tensor.shape[-1]]

    def turned(tensor: Tensor) -> Tensor:  # columns lie together, not rows
        return tensor.t().contiguous().t()

    case = made((6, 40), dtype, device)
    for arrange in (apart, padded, turned):
        arranged = Case(arrange(case.x), apart(case.weight), arrange(case.dy))
        assert not arranged.x.is_contiguous()
        check(arranged)
    check(Case(case.x, case.weight, case.dy[:1, :1].expand(6, 40)))  # the gradient that a sum hands down


def test_extreme_rows(device: str) -> None:
    case = made((3, 48), torch.float32, device)
    scale = torch.tensor([[0.0], [1e-15], [1e15]], device=device)  # squares underflow, squares near the top
    check(Case(case.x * scale, case.weight, case.dy))


def test_no_rows(device: str) -> None:
    y, dx, dweight = run(kernel, made((0, 8), torch.float32, device))
    assert (y.shape, dx.shape) == ((0, 8), (0, 8))
    assert torch.equal(dweight, torch.zeros(8, device=device))


def test_gradients_are_the_same_bits_on_every_run(device: str) -> None:
    case = made((9, 100), torch.float32, device)
    first = run(kernel, case)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(first, run(kernel, case), strict=True))


def test_registration(device: str) -> None:
    case = made((5, 24), torch.bfloat16, device)
    torch.library.opcheck(torch.ops.millrace.rms_norm_fwd.default, (case.x, case.weight, EPS))
    _, rstd = torch.ops.millrace.rms_norm_fwd(case.x, case.weight, EPS)
    torch.library.opcheck(torch.ops.millrace.rms_norm_bwd.default, (case.dy, case.x, case.weight, rstd))


def test_compiled(device: str) -> None:
    check(made((5, 24), torch.float32, device), torch.compile(kernel, backend="aot_eager", fullgraph=True))


def test_auto_runs_the_kernel_where_it_can(device: str) -> None:
    case = made((3, 1000), torch.float32, device)
    auto = rms_norm(case.x, case.weight, EPS)
    assert torch.equal(auto, kernel(case.x, case.weight, EPS))
    wide = Case(*(tensor.double() for tensor in case))
    assert torch.equal(rms_norm(wide.x, wide.weight, EPS), reference.rms_norm(wide.x, wide.weight, EPS))


def test_what_cannot_be_is_refused(device: str) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(
        KernelError, match=r'"triton" is not possible: kernels take .*, not torch\.float64\. Use "auto"'
    ):
        kernel(x.double(), x[0].double(), EPS)
    with pytest.raises(KernelError, match=r"hold rows of up to 8192 columns in registers, not 8193"):
        kernel(torch.ones(1, 8193, device=device), torch.ones(8193, device=device), EPS)
    with pytest.raises(ValueError, match=r"weight has shape \[4\]; x of shape \[2, 8\] needs \[8\]"):
        kernel(x, x[0, :4], EPS)


def test_two_training_steps_of_a_decoder(device: str) -> None:
    config = ModelConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0)).to(device)

    def trained(kernels: Kernels, dtype: torch.dtype) -> dict[str, Tensor]:
        model = Decoder(replace(config, kernels=kernels, initializer_range=0.3), 50)
        initialize(model, 0)
        model.to(device, dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            logits = model(tokens[:, :-1])
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    truth = trained(Kernels.reference, torch.float64)
    plain = trained(Kernels.reference, torch.float32)
    for name, actual in trained(Kernels.triton, torch.float32).items():
        # a weight's gradient sums terms of all positions: its errors are of the tensor's scale, not of the element's
        assert_close_to_truth(actual, plain[name], truth[name], truth[name].abs().max())
