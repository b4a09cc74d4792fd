"""Products of 8-bit codes against float64: on CUDA, or interpreted on the CPU; integer sums are exact."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flows.compression.quantized_linear import W8A8Linear
from flows.compression.quantizer import quantize_
from flows.config.model import Kernels, ModelConfig
from flows.config.quantize import QuantizeConfig
from flows.model.decoder import Decoder, initialize
from kernels import reference
from kernels.dispatch import INTERPRETED, KernelError
from kernels.reference import FP8, INT8
from kernels.testing import apart, assert_close_to_truth, padded, turned
from kernels.w8a8_linear import MAX_INT8_COLUMNS, w8a8_linear

SHAPES = [((1,), 1, 1), ((3,), 65, 100), ((17,), 70, 600), ((2, 35), 33, 130), ((130,), 129, 64)]
"""Tokens, channels, columns; 600 columns are divided among programs, 130 tokens and 129 channels among tiles."""
if not INTERPRETED:
    SHAPES += [((16,), 4096, 4096), ((300,), 1111, 1040), ((2048,), 4096, 4096)]


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    x_scale: Tensor
    weight_scale: Tensor
    bias: Tensor | None


def made(shape: tuple[tuple[int, ...], int, int], codes_dtype: torch.dtype, device: str) -> Case:
    tokens, channels, columns = shape
    generator = torch.Generator().manual_seed(channels)

    def codes(*size: int) -> Tensor:
        if codes_dtype == INT8:
            return torch.randint(-127, 128, size, generator=generator, dtype=INT8).to(device)
        return (100 * torch.randn(size, generator=generator)).clamp(-448, 448).to(FP8).to(device)

    def scales(*size: int) -> Tensor:
        return (torch.rand(size, generator=generator) / 100).to(device)

    bias = torch.randn(channels, generator=generator).to(device)
    return Case(codes(*tokens, columns), codes(channels, columns), scales(*tokens, 1), scales(channels), bias)


def exact(case: Case) -> Case:
    wide = (None if value is None else value.double() for value in case[2:])
    return Case(case.x, case.weight, *wide)


def check(case: Case, dtype: torch.dtype, linear: Any = w8a8_linear) -> None:
    actual = linear(*case, dtype=dtype, kernels="triton")
    plain = reference.w8a8_linear(*case, dtype)
    truth = reference.w8a8_linear(*exact(case), torch.float64)
    scale = case.x_scale.double() * case.weight_scale.double()
    terms = (case.x.double().abs() @ case.weight.double().abs().t()) * scale
    if case.bias is not None:
        terms += case.bias.double().abs()
    assert_close_to_truth(actual, plain, truth, terms)


@pytest.mark.parametrize("codes_dtype", [INT8, FP8])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_products(shape: tuple[tuple[int, ...], int, int], codes_dtype: torch.dtype, device: str) -> None:
    case = made(shape, codes_dtype, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if shape[2] == 100 else (torch.float32,):
        check(case, dtype)
        check(case._replace(bias=None), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_integer_sums_are_exact(shape: tuple[tuple[int, ...], int, int], device: str) -> None:
    case = made(shape, INT8, device)
    x = case.x % 16 if shape[2] > 1000 else case.x  # sums below 2^24 are float32 numbers
    y = w8a8_linear(
        x,
        case.weight,
        torch.ones_like(case.x_scale),
        torch.ones_like(case.weight_scale),
        dtype=torch.float32,
        kernels="triton",
    )
    expected = x.double() @ case.weight.double().t()
    assert expected.abs().max() < 2**24
    assert torch.equal(y.double(), expected)


def test_the_longest_rows_of_the_largest_codes_do_not_overflow(device: str) -> None:
    columns = 2**24 // 127**2 if INTERPRETED else MAX_INT8_COLUMNS
    x = torch.full((1, columns), 127, dtype=INT8, device=device)
    one = torch.ones(1, 1, device=device)
    y = w8a8_linear(x, -x, one, one[0], dtype=torch.float32, kernels="triton")
    assert y.item() == torch.tensor(-float(127**2 * columns), dtype=torch.float32).item()


@pytest.mark.parametrize("codes_dtype", [INT8, FP8])
def test_strided_inputs(codes_dtype: torch.dtype, device: str) -> None:
    case = made(((6,), 20, 48), codes_dtype, device)
    for arrange in (apart, padded, turned):
        x, weight = arrange(case.x), arrange(case.weight)
        assert not x.is_contiguous()
        check(Case(x, weight, padded(case.x_scale), apart(case.weight_scale), apart(case.bias)), torch.float32)


@pytest.mark.parametrize("codes_dtype", [INT8, FP8])
def test_a_row_depends_on_itself_alone(codes_dtype: torch.dtype, device: str) -> None:
    case = made(((17,), 70, 600), codes_dtype, device)
    together = w8a8_linear(*case, dtype=torch.float32, kernels="triton")
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = case._replace(x=case.x[order], x_scale=case.x_scale[order])
    assert torch.equal(w8a8_linear(*shuffled, dtype=torch.float32, kernels="triton"), together[order])
    zeros = torch.zeros(17, 8, device=device).to(codes_dtype)
    padded = case._replace(x=torch.cat((case.x, zeros), 1), weight=torch.cat((case.weight, case.weight[:, :8]), 1))
    check(padded, torch.float32)
    if codes_dtype == INT8:
        assert torch.equal(w8a8_linear(*padded, dtype=torch.float32, kernels="triton"), together)


def test_no_rows(device: str) -> None:
    case = made(((0,), 5, 16), INT8, device)
    assert w8a8_linear(*case, kernels="triton").shape == (0, 5)


@pytest.mark.parametrize("codes_dtype", [INT8, FP8])
def test_divided_sums_are_the_same_bits_on_every_run(codes_dtype: torch.dtype, device: str) -> None:
    case = made(((17,), 70, 600), codes_dtype, device)
    first = w8a8_linear(*case, kernels="triton")
    assert all(torch.equal(first, w8a8_linear(*case, kernels="triton")) for _ in range(2))


def test_registration(device: str) -> None:
    case = made(((5,), 20, 48), INT8, device)
    arguments = (case.x, case.weight, case.x_scale[:, 0], case.weight_scale, case.bias, torch.bfloat16)
    torch.library.opcheck(torch.ops.millrace.w8a8_linear.default, arguments)


@pytest.mark.exhaustive
def test_compiled(device: str) -> None:
    compiled = torch.compile(w8a8_linear, backend="aot_eager", fullgraph=True)
    check(made(((2, 3), 20, 48), FP8, device), torch.bfloat16, compiled)


def test_a_quantized_decoder_runs_the_kernel_and_scores_the_same(device: str) -> None:
    config = ModelConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = Decoder(replace(config, kernels=Kernels.reference), 50)
    initialize(model, 0)
    quantize_(model.requires_grad_(False), QuantizeConfig(min_sqnr_db=0))
    model.to(device)
    tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0)).to(device)
    layers = [layer for layer in model.modules() if isinstance(layer, W8A8Linear)]
    assert len(layers) == 8
    scores = []
    for kernels in ("triton", "reference"):
        for layer in layers:
            layer.kernels = kernels
        scores.append(model(tokens))
    assert torch.equal(*scores)  # codes, whole sums and two products in float32 are the same bits


def test_what_cannot_be_is_refused(device: str) -> None:
    case = made(((2,), 4, 16), INT8, device)
    with pytest.raises(ValueError, match=r"codes are torch\.int8 and torch\.float8_e4m3fn; both must be"):
        w8a8_linear(case.x, case.weight.to(FP8), *case[2:], kernels="triton")
    with pytest.raises(ValueError, match=r"x_scale \[2\] .* do not fit x \[2, 16\]; it needs \[N, 16\], \[2, 1\] and"):
        w8a8_linear(*case._replace(x_scale=case.x_scale[:, 0]), kernels="triton")
    with pytest.raises(ValueError, match=r"weight \[4, 8\]"):
        w8a8_linear(*case._replace(weight=case.weight[:, :8]), kernels="triton")
    with pytest.raises(KernelError, match=r"not torch\.float64"):
        w8a8_linear(*exact(case), kernels="triton")
    long = case.x[:1, :1].expand(1, MAX_INT8_COLUMNS + 1)
    with pytest.raises(ValueError, match=r"rows of 133145 int8 codes may overflow int32; 133144 columns are safe"):
        w8a8_linear(long, long, case.x_scale[:1], case.weight_scale[:1], kernels="triton")
