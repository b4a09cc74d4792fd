"""The 4-bit linear layer against float64: on CUDA, or interpreted on the CPU; every weight is read exactly."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import INTERPRETED, KernelError
from kernels.int4_layout import pack
from kernels.testing import apart, assert_close_to_truth, padded, turned
from kernels.w4a16_linear import w4a16_linear

SHAPES = [(1, 1, 32, 32), (3, 65, 96, 32), (17, 70, 320, 64), (3, 33, 640, 128), (70, 129, 192, 64)]
"""Tokens, channels, columns, group size; 640 columns are divided among programs, 70 tokens and 129 channels among
tiles; 96, 192 and 320 columns end within a block of packed ones."""
if not INTERPRETED:
    SHAPES += [(16, 4096, 4096, 128), (300, 1111, 1056, 32), (2048, 4096, 4096, 128)]


class Case(NamedTuple):
    x: Tensor
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None


def codes(channels: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(channels + columns)
    return torch.randint(0, 16, (channels, columns), generator=generator, dtype=torch.uint8)


def made(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, symmetric: bool = False) -> Case:
    tokens, channels, columns, group_size = shape
    generator = torch.Generator().manual_seed(channels)
    groups = columns // group_size
    x = torch.randn(tokens, columns, generator=generator)
    scales = torch.rand(groups, channels, generator=generator) / 50
    zeros = torch.randint(0, 16, (groups, channels), generator=generator, dtype=torch.uint8).to(device)
    bias = torch.randn(channels, generator=generator).to(device, dtype)
    packed = pack(codes(channels, columns)).to(device)
    return Case(x.to(device, dtype), packed, scales.to(device, dtype), None if symmetric else zeros, bias)


def plain(case: Case) -> Tensor:
    """What torch gives with the weights in the dtype of the activations."""
    identity = torch.eye(case.x.shape[-1], device=case.x.device)
    weight = reference.w4a16_linear(identity, case.packed, case.scales.float(), case.zeros, None).to(case.x.dtype)
    return torch.nn.functional.linear(case.x, weight.t(), case.bias)


def exact(case: Case) -> Case:
    wide = (None if value is None else value.double() for value in (case.x, case.scales, case.bias))
    x, scales, bias = wide
    return Case(x, case.packed, scales, case.zeros, bias)


def check(case: Case, linear: Any = w4a16_linear) -> None:
    truth = reference.w4a16_linear(*exact(case))
    assert_close_to_truth(linear(*case, kernels="triton"), plain(case), truth)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int, int], dtype: torch.dtype, symmetric: bool, device: str) -> None:
    check(made(shape, dtype, device, symmetric))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 17, 70])
def test_every_weight_is_read_exactly(tokens: int, group_size: int, dtype: torch.dtype, device: str) -> None:
    """One-hot activations pick columns out: around all borders of groups, quarters, blocks and splits."""
    columns, channels = 640, 9
    case = made((tokens, channels, columns, group_size), dtype, device)._replace(bias=None)
    borders = torch.arange(0, columns, 32)
    picked = torch.cat((borders, borders + 31, torch.arange(32)))[-tokens:] if tokens == 70 else borders[:tokens] + 31
    x = torch.nn.functional.one_hot(picked, columns).to(device, dtype)
    scales = torch.exp2(torch.arange(channels) % 5 - torch.arange(columns // group_size)[:, None] % 3).to(case.scales)
    y = w4a16_linear(x, case.packed, scales, case.zeros, kernels="triton")
    groups = picked // group_size  # scales that are powers of two round nothing
    expected = (codes(channels, columns).t()[picked].double() - case.zeros.cpu()[groups]) * scales.cpu().double()[
        groups
    ]
    assert torch.equal(y.cpu().double(), expected)


@pytest.mark.parametrize("tokens", [3, 17, 70])
def test_sums_of_whole_numbers_are_exact(tokens: int, device: str) -> None:
    case = made((tokens, 33, 320, 64), torch.float16, device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (tokens, 320), generator=generator).to(device, torch.float16)
    ones = torch.ones_like(case.scales)
    y = w4a16_linear(x, case.packed, ones, case.zeros, kernels="triton")
    truth = reference.w4a16_linear(x.double(), case.packed, ones.double(), case.zeros, None)
    assert truth.abs().max() <= 2048  # whole numbers up to there are float16 numbers
    assert torch.equal(y.double(), truth)


def test_strided_inputs(device: str) -> None:
    case = made((6, 20, 192, 64), torch.bfloat16, device)
    for arrange in (apart, padded, turned):
        arranged = Case(*(arrange(tensor) for tensor in case[:4]), apart(case.bias))
        assert not arranged.x.is_contiguous()
        check(arranged)


def test_a_row_depends_on_itself_alone(device: str) -> None:
    case = made((17, 70, 320, 64), torch.bfloat16, device)
    together = w4a16_linear(*case, kernels="triton")
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(w4a16_linear(*case._replace(x=case.x[order]), kernels="triton"), together[order])
    spoilt = case.x.clone()
    spoilt[3, -1] = torch.nan
    y = w4a16_linear(*case._replace(x=spoilt), kernels="triton")
    assert y[3].isnan().all()
    assert torch.equal(y[4:], together[4:])


def test_leading_dimensions_and_no_rows(device: str) -> None:
    case = made((6, 20, 96, 32), torch.bfloat16, device)
    y = w4a16_linear(*case._replace(x=case.x.view(2, 3, 96)), kernels="triton")
    assert torch.equal(y.view(6, 20), w4a16_linear(*case, kernels="triton"))
    assert w4a16_linear(*case._replace(x=case.x[:0]), kernels="triton").shape == (0, 20)


def test_divided_sums_are_the_same_bits_on_every_run(device: str) -> None:
    case = made((3, 33, 640, 128), torch.bfloat16, device)
    first = w4a16_linear(*case, kernels="triton")
    assert all(torch.equal(first, w4a16_linear(*case, kernels="triton")) for _ in range(2))


def test_registration(device: str) -> None:
    torch.library.opcheck(torch.ops.millrace.w4a16_linear.default, made((5, 20, 96, 32), torch.bfloat16, device))


@pytest.mark.exhaustive
def test_compiled(device: str) -> None:
    compiled = torch.compile(w4a16_linear, backend="aot_eager", fullgraph=True)
    check(made((5, 20, 96, 32), torch.bfloat16, device), compiled)


def test_auto_runs_the_kernel_where_it_can(device: str) -> None:
    case = made((5, 20, 96, 32), torch.bfloat16, device)
    assert torch.equal(w4a16_linear(*case), w4a16_linear(*case, kernels="triton"))
    wide = exact(case)
    assert torch.equal(w4a16_linear(*wide), reference.w4a16_linear(*wide))


def test_what_cannot_be_is_refused(device: str) -> None:
    case = made((2, 4, 96, 32), torch.bfloat16, device)
    with pytest.raises(KernelError, match=r"kernels take float16 and bfloat16, not torch\.float64"):
        w4a16_linear(*exact(case), kernels="triton")
    with pytest.raises(ValueError, match=r"2 groups of K=96 columns are not groups of 32, 64 or 128"):
        w4a16_linear(*case._replace(scales=case.scales[:2]))
    with pytest.raises(ValueError, match=r"packed is torch\.int16 \[4, 31\]; N=4 and K=96 are int16 \[4, 32\]"):
        w4a16_linear(*case._replace(packed=case.packed[:, 1:]))
    with pytest.raises(ValueError, match=r"zeros are torch\.uint8 \[3, 3\]; the scales need uint8 \[3, 4\]"):
        w4a16_linear(*case._replace(zeros=case.zeros[:, 1:]))
    with pytest.raises(ValueError, match=r"scales are torch\.float32; activations in torch\.bfloat16 need theirs"):
        w4a16_linear(*case._replace(scales=case.scales.float()))
    with pytest.raises(ValueError, match="have no gradient"):
        w4a16_linear(*case._replace(x=case.x.clone().requires_grad_()))
