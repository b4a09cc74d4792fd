"""The rotary kernel against float64, in place: on CUDA, or interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import INTERPRETED, KernelError
from kernels.rotary import rotary
from kernels.testing import apart, assert_close_to_truth, turned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
KERNEL: Turn = partial(rotary, kernels="triton")


class Shape(NamedTuple):
    batch: int
    length: int
    q_heads: int
    k_heads: int
    width: int
    positions: int
    """Rows of angles: one for all sequences, or one each."""


SHAPES = [
    Shape(1, 1, 1, 1, 2, 1),
    Shape(2, 5, 6, 2, 12, 1),
    Shape(2, 3, 3, 3, 64, 2),
    Shape(1, 2, 71, 1, 80, 1),  # more heads than a program turns at once, halves of no power of two
]
if not INTERPRETED:
    SHAPES += [Shape(3, 1000, 32, 8, 128, 3)]


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    dq: Tensor
    dk: Tensor
    cos: Tensor
    sin: Tensor


def heads(x_BLW: Tensor, num_heads: int) -> Tensor:
    """A projection [B, L, H * K] as the model looks at it [B, H, L, K]."""
    return x_BLW.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def made(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(sum(shape))

    def projection(num_heads: int) -> Tensor:
        x = torch.randn(shape.batch, shape.length, num_heads * shape.width, generator=generator)
        return heads(x.to(device, dtype), num_heads)

    angles = 1000 * torch.rand(shape.positions, 1, shape.length, shape.width // 2, generator=generator)
    angles = torch.cat((angles, angles), dim=-1).to(device)
    tensors = [projection(num_heads) for num_heads in (shape.q_heads, shape.k_heads) * 2]
    return Case(*tensors, angles.cos(), angles.sin())


def run(turn: Turn, case: Case) -> tuple[Tensor, ...]:
    """Turned queries and keys, and their gradients, from copies of the same strides."""

    def fresh(x: Tensor) -> Tensor:
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        return copy.requires_grad_()

    q, k = fresh(case.q), fresh(case.k)
    turned = turn(q[:], k[:], case.cos, case.sin)  # views: what is turned in place must not be a leaf
    gradients = torch.autograd.grad(turned, (q, k), (case.dq, case.dk))
    return *(x.detach() for x in turned), *gradients


def check(case: Case, turn: Turn = KERNEL) -> None:
    truth = run(reference.rotary, Case(*(tensor.double() for tensor in case)))
    plain = run(reference.rotary, case)
    cos, sin = case.cos.double().abs(), case.sin.double().abs()
    sizes = (x.double().abs() * cos + x.double().abs().roll(x.shape[-1] // 2, -1) * sin for x in case[:4])
    for results in zip(run(turn, case), plain, truth, sizes, strict=True):
        assert_close_to_truth(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: Shape, dtype: torch.dtype, device: str) -> None:
    check(made(shape, dtype, device))


def test_any_strides(device: str) -> None:
    case = made(Shape(2, 3, 4, 2, 10, 1), torch.float32, device)
    dense = Case(*(tensor.contiguous() for tensor in case))  # heads before tokens
    spread = Case(*(apart(tensor) for tensor in case[:4]), *case[4:])
    widths_first = Case(*(turned(tensor) for tensor in case[:4]), *case[4:])
    summed = case._replace(dq=case.dq[:1, :1, :1, :1].expand(case.q.shape))  # as from a sum
    for arranged in (dense, spread, widths_first, summed):
        check(arranged)


def test_parts_of_one_projection_are_turned_where_they_lie(device: str) -> None:
    case = made(Shape(2, 3, 4, 2, 8, 1), torch.float32, device)
    together = torch.cat([x.transpose(1, 2).flatten(2) for x in (case.q, case.k, case.k)], dim=-1)
    q, k, v = (heads(x, x.shape[-1] // 8) for x in together.split((32, 16, 16), dim=-1))
    turned_q, turned_k = KERNEL(q, k, case.cos, case.sin)
    assert turned_q.data_ptr() == together.data_ptr()
    expected_q, expected_k = KERNEL(case.q.clone(), case.k.clone(), case.cos, case.sin)
    assert torch.equal(turned_q, expected_q)
    assert torch.equal(turned_k, expected_k)
    assert torch.equal(v, case.k)  # what lies beside them stays


def test_turning_back_gives_what_was_turned(device: str) -> None:
    case = made(Shape(2, 3, 2, 1, 16, 2), torch.float32, device)
    q, k = KERNEL(case.q.clone(), case.k.clone(), case.cos, case.sin)
    back_q, back_k = torch.ops.millrace.rotary_bwd(q, k, case.cos, case.sin)
    for back, x in ((back_q, case.q), (back_k, case.k)):
        # twice three roundings in float32 of terms up to sqrt(2) times the pair
        assert (back - x).abs().max() <= 6 * 2**0.5 * torch.finfo(torch.float32).eps * x.abs().max()


def test_no_tokens(device: str) -> None:
    results = run(KERNEL, made(Shape(2, 0, 2, 1, 8, 1), torch.float32, device))
    assert [result.shape[1:] for result in results] == [(2, 0, 8), (1, 0, 8)] * 2


def test_a_token_depends_on_no_other_and_bits_are_the_same_on_every_run(device: str) -> None:
    case = made(Shape(2, 5, 2, 1, 8, 1), torch.bfloat16, device)
    first, again = run(KERNEL, case), run(KERNEL, case)
    part = run(KERNEL, Case(*(tensor[:, :, 1:4] for tensor in case)))
    for one, other, piece in zip(first, again, part, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[:, :, 1:4], piece)


def test_who_kept_what_is_overwritten_hears_of_it(device: str) -> None:
    case = made(Shape(1, 2, 2, 1, 8, 1), torch.float32, device)
    weight = torch.ones((), device=device, requires_grad=True)
    q, k = case.q * weight, case.k * weight
    kept = q.square().sum()
    q, _ = KERNEL(q, k, case.cos, case.sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (kept + q.sum()).backward()
    with pytest.raises(ValueError, match="neither may be a leaf that requires gradients"):
        KERNEL(case.q.requires_grad_(), case.k, case.cos, case.sin)


def test_gradients_handed_down_stay_as_they_were(device: str) -> None:
    case = made(Shape(1, 2, 2, 1, 8, 1), torch.float32, device)
    before = case.dq.clone(), case.dk.clone()
    run(KERNEL, case)
    assert torch.equal(case.dq, before[0])
    assert torch.equal(case.dk, before[1])


def test_registration(device: str) -> None:
    case = made(Shape(2, 3, 2, 1, 8, 1), torch.bfloat16, device)
    angles = case.cos, case.sin
    torch.library.opcheck(torch.ops.millrace.rotary_fwd.default, (case.q, case.k, *angles))
    torch.library.opcheck(torch.ops.millrace.rotary_bwd.default, (case.dq, case.dk, *angles))


def test_compiled(device: str) -> None:
    compiled = torch.compile(KERNEL, backend="aot_eager", fullgraph=True)
    check(made(Shape(2, 3, 4, 2, 8, 1), torch.float32, device), compiled)


def test_what_cannot_be_is_refused(device: str) -> None:
    case = made(Shape(2, 3, 2, 1, 8, 2), torch.float32, device)
    q, k, cos, sin = case.q, case.k, case.cos, case.sin
    with pytest.raises(KernelError, match=r'"triton" is not possible: kernels take .*, not torch\.float64'):
        KERNEL(q.double(), k.double(), cos, sin)
    with pytest.raises(ValueError, match=r"q \[2, 2, 3, 8\] and k \[2, 1, 3, 4\] must be .*, K even"):
        KERNEL(q, k[..., :4], cos, sin)
    with pytest.raises(ValueError, match=r"cos \[2, 1, 3, 4\] and sin \[2, 1, 3, 4\] must be \[2 or 1, 1, 3, 8\]"):
        KERNEL(q, k, cos[..., :4], sin[..., :4])
