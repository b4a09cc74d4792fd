"""The decode attention kernels against float64: on CUDA, or interpreted on the CPU with parts of 32 tokens."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import INTERPRETED, KernelError
from kernels.paged_decode_attention import paged_decode_attention
from kernels.testing import apart, assert_close_to_truth

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor


class Shape(NamedTuple):
    heads: int
    key_heads: int
    width: int
    page: int
    lengths: tuple[int, ...]


SHAPES = {
    torch.float32: Shape(3, 1, 16, 16, (96, 0, 1)),  # more parts than are merged at once, an empty sequence
    torch.float16: Shape(2, 2, 12, 5, (33, 32)),  # pages and widths that are no powers of two
    torch.bfloat16: Shape(4, 2, 8, 64, (65,)),
}
MORE_SHAPES = [
    Shape(1, 1, 1, 1, (3, 1)),
    Shape(17, 1, 40, 8, (100, 31)),  # more query heads than the rows that a matrix unit takes at least
    Shape(6, 2, 128, 16, (0, 0, 64)),
]
if not INTERPRETED:
    MORE_SHAPES += [Shape(32, 8, width, 16, (5000, 1, 0, 4096)) for width in (64, 80, 128, 256)]


def made(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(sum(shape.lengths))
    pages = [-(-length // shape.page) for length in shape.lengths]
    spare = 2
    cache = (sum(pages) + spare, shape.page, shape.key_heads, shape.width)
    numbers = torch.randperm(sum(pages), generator=generator).split(pages)
    table = torch.full((len(pages), max(pages)), -1)  # behind a sequence's last page: no page at all
    for row, mine in zip(table, numbers, strict=True):
        row[: len(mine)] = mine
    k, v = (torch.randn(cache, generator=generator) for _ in range(2))
    for kept in (k, v):  # what no token has filled yet is not looked at
        filled = torch.zeros(cache[:2], dtype=torch.bool)
        for length, mine in zip(shape.lengths, numbers, strict=True):
            position = torch.arange(len(mine) * shape.page).view(-1, shape.page, 1, 1)
            kept[mine] *= 1 + position / 20  # later tokens tend to score higher: a maximum is not found at once
            filled[mine] = (torch.arange(len(mine) * shape.page) < length).unflatten(0, (-1, shape.page))
        kept[~filled] = torch.nan
    q = 2 * torch.randn(len(pages), shape.heads, shape.width, generator=generator)
    floats = (x.to(device, dtype) for x in (q, k, v))
    return Case(*floats, table.int().to(device), torch.tensor(shape.lengths, device=device))


def wide(case: Case) -> Case:
    return Case(*(x.double() for x in case[:3]), *case[3:])


def check(case: Case) -> Tensor:
    y = paged_decode_attention(*case, "triton")
    sizes = wide(case)._replace(v_pages=case.v_pages.double().abs())
    truth, magnitude = reference.paged_decode_attention(*wide(case)), reference.paged_decode_attention(*sizes)
    # plain torch computes in float32; matrix units take weights in the dtype of the values: one rounding of each
    rounding = torch.finfo(y.dtype).eps / torch.finfo(torch.float32).eps / 16
    assert_close_to_truth(y, reference.paged_decode_attention(*case), truth, magnitude * (1 + rounding))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_truth(dtype: torch.dtype, device: str) -> None:
    """And the same bits again."""
    case = made(SHAPES[dtype], dtype, device)
    assert torch.equal(check(case), paged_decode_attention(*case, "triton"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
def test_more_shapes(shape: Shape, dtype: torch.dtype, device: str) -> None:
    check(made(shape, dtype, device))


def test_a_sequence_depends_on_no_other_bit_for_bit(device: str) -> None:
    """Alone, in another row, with a longer table, with its pages elsewhere."""
    case = made(Shape(2, 1, 8, 16, (40, 7)), torch.bfloat16, device)
    both = paged_decode_attention(*case, "triton")
    alone = Case(case.q[:1], case.k_pages, case.v_pages, case.page_table[:1], case.lengths[:1])
    assert torch.equal(paged_decode_attention(*alone, "triton"), both[:1])
    order = torch.randperm(len(case.k_pages), generator=torch.Generator().manual_seed(1)).to(device)
    table = torch.nn.functional.pad(order.argsort()[case.page_table.clamp(min=0)], (0, 3), value=-1).flip(0)
    moved = Case(case.q.flip(0), case.k_pages[order], case.v_pages[order], table, case.lengths.flip(0))
    assert torch.equal(paged_decode_attention(*moved, "triton"), both.flip(0))


def test_strided_inputs(device: str) -> None:
    """Heads before slots in the cache, keys and values in one tensor, a part of a wider table."""
    case = made(Shape(2, 2, 8, 16, (20,)), torch.float32, device)
    k, v = torch.stack((case.k_pages, case.v_pages), dim=1).transpose(2, 3).contiguous().transpose(2, 3).unbind(1)
    table = torch.cat((case.page_table, case.page_table), dim=1)[:, ::2]
    table[:] = case.page_table
    strided = Case(apart(case.q), k, v, table, case.lengths.repeat(2)[::2][:1])
    assert not any(x.is_contiguous() for x in strided[:3])
    assert torch.equal(check(strided), check(case))


@pytest.mark.parametrize("sequences", [0, 1])
def test_nothing_at_all(sequences: int, device: str) -> None:
    q, pages = torch.ones(sequences, 2, 8, device=device), torch.ones(1, 16, 1, 8, device=device)
    table = torch.zeros(sequences, 0, dtype=torch.int32, device=device)
    y = paged_decode_attention(q, pages, pages, table, torch.zeros(sequences, dtype=torch.int32, device=device))
    assert torch.equal(y, torch.zeros_like(q))


def test_registration(device: str) -> None:
    case = made(Shape(1, 1, 8, 16, (3,)), torch.bfloat16, device)
    torch.library.opcheck(torch.ops.millrace.paged_decode_attention_fwd.default, tuple(case))


@pytest.mark.exhaustive
def test_compiled(device: str) -> None:
    case = made(Shape(1, 1, 8, 16, (3,)), torch.float32, device)
    compiled = torch.compile(paged_decode_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*case), paged_decode_attention(*case, "triton"))


def test_what_cannot_be_is_refused(device: str) -> None:
    q, pages = torch.ones(2, 4, 8, device=device), torch.ones(3, 16, 2, 8, device=device)
    table, lengths = (
        torch.zeros(2, 1, dtype=torch.int32, device=device),
        torch.ones(2, dtype=torch.int32, device=device),
    )
    with pytest.raises(KernelError, match=r"not torch\.float64"):
        paged_decode_attention(q.double(), pages.double(), pages.double(), table, lengths, "triton")
    wide_q, wide_pages = torch.ones(2, 4, 257, device=device), torch.ones(3, 16, 2, 257, device=device)
    with pytest.raises(KernelError, match=r"up to 256 columns in registers, not 257"):
        paged_decode_attention(wide_q, wide_pages, wide_pages, table, lengths, "triton")
    with pytest.raises(ValueError, match=r"needs \[pages, page size, a divisor of 3, 8\] for both"):
        paged_decode_attention(q[:, :3], pages, pages, table, lengths)
    with pytest.raises(ValueError, match=r"needs \[pages, page size, a divisor of 4, 8\] for both"):
        paged_decode_attention(q, pages, pages[:2], table, lengths)
    with pytest.raises(ValueError, match=r"q is torch\.float32, k_pages torch\.float16"):
        paged_decode_attention(q, pages.half(), pages, table, lengths)
    with pytest.raises(ValueError, match=r"needs \[2, pages\] and \[2\]"):
        paged_decode_attention(q, pages, pages, table, lengths[:1])
