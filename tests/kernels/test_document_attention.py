"""The attention kernels against float64: on CUDA, or interpreted on the CPU with blocks of 16 and 32."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import INTERPRETED, KernelError
from kernels.document_attention import DocumentBounds, document_attention, document_bounds
from kernels.testing import apart, assert_close_to_truth, turned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Attention = Callable[[Tensor, Tensor, Tensor, DocumentBounds], Tensor]


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor
    documents: DocumentBounds


class Results(NamedTuple):
    y: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Shape(NamedTuple):
    heads: int
    key_heads: int
    width: int
    lengths: tuple[tuple[int, ...], ...]
    """Of the documents in each row."""


SHAPES = {
    torch.float32: Shape(3, 1, 16, ((1, 15, 17, 7), (40,))),  # borders within and between blocks, more than one block
    torch.float16: Shape(2, 2, 12, ((33,),)),  # one token in the last block, a width between powers of two
    torch.bfloat16: Shape(2, 1, 8, ((1, 1, 2, 31),)),
}
MORE_SHAPES = [
    Shape(1, 1, 1, ((1,),)),
    Shape(6, 2, 24, ((70,), (35, 35))),
    Shape(2, 1, 128, ((16, 16, 16, 16), (32, 32), (63, 1))),
    Shape(3, 3, 40, ((5, 60), (1,) * 65)),
]
if not INTERPRETED:
    MORE_SHAPES += [Shape(8, 2, width, ((1000, 1, 1047), (2048,))) for width in (64, 80, 128)]


def bounds(lengths: tuple[tuple[int, ...], ...], device: str) -> DocumentBounds:
    ids = [[document for document, length in enumerate(row) for _ in range(length)] for row in lengths]
    return document_bounds(torch.tensor(ids, device=device))


def made(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(sum(shape.lengths[0]))
    length = sum(shape.lengths[0])

    def normal(heads: int) -> Tensor:
        x = torch.randn(len(shape.lengths), heads, length, shape.width, generator=generator)
        return x.to(device, dtype)

    q, k, v, dy = (normal(heads) for heads in (shape.heads, shape.key_heads, shape.key_heads, shape.heads))
    return Case(2 * q, k, v, dy, bounds(shape.lengths, device))


def run(attention: Attention, case: Case) -> Results:
    inputs = [x.detach().requires_grad_() for x in case[:3]]
    y = attention(*inputs, case.documents)
    return Results(y.detach(), *torch.autograd.grad(y, inputs, case.dy))


def kernel(q: Tensor, k: Tensor, v: Tensor, documents: DocumentBounds) -> Tensor:
    return document_attention(q, k, v, documents, "triton")


def plain(q: Tensor, k: Tensor, v: Tensor, documents: DocumentBounds) -> Tensor:
    return reference.document_attention(q, k, v, documents.first)


def magnitudes(case: Case) -> Results:
    """Sizes of the terms that add up to each element."""
    q, k, v, dy = (x.double() for x in case[:4])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    order = torch.arange(q.shape[2], device=q.device)
    allowed = ((order <= order[:, None]) & (order >= case.documents.first[:, :, None]))[:, None]
    scale = q.shape[3] ** -0.5
    weights = (q @ k.mT * scale).where(allowed, -torch.inf).softmax(-1)
    dweights = dy.abs() @ v.abs().mT
    dscores = weights * (dweights + (weights * dweights).sum(-1, keepdim=True)) * scale
    dk, dv = dscores.mT @ q.abs(), weights.mT @ dy.abs()
    return Results(
        weights @ v.abs(), dscores @ k.abs(), *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    )  # fmt: skip


def check(case: Case, attention: Attention = kernel, largest_score: float = 1.0) -> Results:
    truth = run(plain, Case(*(x.double() for x in case[:4]), case.documents))
    results = run(attention, case)
    for actual, achieved, exact, terms in zip(results, run(plain, case), truth, magnitudes(case), strict=True):
        assert_close_to_truth(actual, achieved, exact, terms * largest_score)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(dtype: torch.dtype, device: str) -> None:
    """And the same bits again: gradients of shared heads are summed in a fixed order."""
    case = made(SHAPES[dtype], dtype, device)
    first = check(case)
    if dtype != torch.float32:
        assert all(torch.equal(one, other) for one, other in zip(first, run(kernel, case), strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
def test_more_shapes(shape: Shape, dtype: torch.dtype, device: str) -> None:
    check(made(shape, dtype, device))


def test_parts_of_one_projection(device: str) -> None:
    """Queries, keys and values beside each other in memory, tokens before heads; a gradient that a sum hands down."""
    case = made(Shape(2, 1, 8, ((9, 10),)), torch.float32, device)
    joined = torch.cat([x.transpose(1, 2).flatten(2) for x in case[:3]], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in joined.split((16, 8, 8), dim=-1))
    assert torch.equal(q, case.q)
    assert not any(x.is_contiguous() for x in (q, k, v))
    check(Case(q, k, v, case.dy[:1, :1, :1, :1].expand_as(case.dy), case.documents))


def test_columns_and_bounds_that_lie_apart(device: str) -> None:
    case = made(Shape(1, 1, 8, ((3, 5), (8,))), torch.float32, device)
    check(Case(*(apart(x) for x in case[:4]), DocumentBounds(*(turned(x) for x in case.documents))))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_nothing_at_all(shape: tuple[int, ...], device: str) -> None:
    x = torch.zeros(shape, device=device)
    ids = torch.zeros(shape[0], shape[2], dtype=torch.int64, device=device)
    for result in run(kernel, Case(x, x, x, x, document_bounds(ids))):
        assert result.shape == shape


def test_a_document_depends_on_no_other_bit_for_bit(device: str) -> None:
    """Other tokens and other borders around it change no bit of it, nor of its gradients."""
    case = made(Shape(2, 1, 8, ((9, 25, 6),)), torch.bfloat16, device)
    generator = torch.Generator().manual_seed(1)
    mine = slice(9, 34)

    def surrounded(x: Tensor) -> Tensor:
        others = torch.randn(x.shape, generator=generator).to(device, x.dtype)
        others[:, :, mine] = x[:, :, mine]
        return others

    changed = Case(*(surrounded(x) for x in case[:4]), bounds(((4, 4, 1, 25, 2, 4),), device))
    for one, other in zip(run(kernel, case), run(kernel, changed), strict=True):
        assert torch.equal(one[:, :, mine], other[:, :, mine])
        assert not torch.equal(one, other)


def test_what_follows_a_document_changes_no_bit_of_it(device: str) -> None:
    short, long = (made(Shape(1, 1, 8, lengths), torch.float32, device) for lengths in (((20,),), ((20, 17),)))
    padded = Case(*(torch.cat((x, y[:, :, 20:]), 2) for x, y in zip(short[:4], long[:4], strict=True)), long.documents)
    for one, other in zip(run(kernel, short), run(kernel, padded), strict=True):
        assert torch.equal(one, other[:, :, :20])


def test_large_scores(device: str) -> None:
    """A softmax that is all on one key, of scores whose exponentials would overflow."""
    case = made(Shape(1, 1, 16, ((20,),)), torch.float32, device)
    case = case._replace(q=case.q * 10, k=case.k * 10)
    scores = case.q.abs() @ case.k.abs().mT / 4
    assert scores.max() > 1000
    # a score is rounded relative to its size, and so much does its exponential err relative to its own
    check(case, largest_score=scores.max().item())


def test_registration(device: str) -> None:
    case = made(Shape(2, 1, 8, ((3, 2),)), torch.bfloat16, device)
    operations = torch.ops.millrace
    torch.library.opcheck(operations.document_attention_fwd.default, (*case[:3], case.documents.first))
    y, lse = operations.document_attention_fwd(*case[:3], case.documents.first)
    backward = (case.dy, *case[:3], y, lse, *case.documents)
    torch.library.opcheck(operations.document_attention_bwd.default, backward)


def test_compiled(device: str) -> None:
    def whole(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return kernel(q, k, v, document_bounds(ids))

    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([[0, 0, 1, 1, 1]], device=device)
    case = made(Shape(2, 1, 8, ((2, 3),)), torch.float32, device)
    check(case, lambda q, k, v, documents: compiled(q, k, v, ids))


def test_auto_runs_the_kernel_where_it_can(device: str) -> None:
    case = made(Shape(2, 1, 12, ((20, 7),)), torch.float32, device)
    assert torch.equal(document_attention(*case[:3], case.documents), kernel(*case[:3], case.documents))
    for x in (case.q.double(), torch.ones(1, 1, 27, 129, device=device)):
        assert torch.equal(document_attention(x, x, x, case.documents), plain(x, x, x, case.documents))


def test_what_cannot_be_is_refused(device: str) -> None:
    documents = bounds(((2, 3),), device)
    x, wide = torch.ones(1, 4, 5, 8, device=device), torch.ones(1, 4, 5, 129, device=device)
    with pytest.raises(KernelError, match=r"hold rows of up to 128 columns in registers, not 129"):
        kernel(wide, wide, wide, documents)
    with pytest.raises(KernelError, match=r"not torch\.float64"):
        kernel(x.double(), x.double(), x.double(), documents)
    for k, v in ((x[:, :3], x[:, :3]), (x, x[:, :2]), (x[..., :4], x[..., :4]), (x[:, :, :4], x[:, :, :4])):
        with pytest.raises(ValueError, match=r"q of shape \[1, 4, 5, 8\] needs \[1, a divisor of 4, 5, 8\] for both"):
            kernel(x, k, v, documents)
    with pytest.raises(ValueError, match=r"documents have shape \[1, 4\]; q needs \[1, 5\]"):
        kernel(x, x, x, bounds(((4,),), device))
