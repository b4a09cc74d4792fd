"""8-bit quantization: on CUDA, or interpreted on the CPU; the kernel gives the bits of the reference."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import INTERPRETED, KernelError
from kernels.quantize import MAX_GROUP, dequantize, quantize_groups, quantize_rows
from kernels.reference import FP8, INT8, LARGEST_CODE, SMALLEST_MAGNITUDE
from kernels.testing import apart, padded, turned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [((1, 1), 1), ((3, 33), 33), ((2, 5, 96), 32), ((70, 64), 64), ((3, 1000), 1000)]  # 70 groups: two programs
if not INTERPRETED:
    SHAPES += [((1000, 4096), 128), ((300, MAX_GROUP), MAX_GROUP)]
HALF_A_STEP = {INT8: 0.5, FP8: 2.0**-10}
"""Of E4M3: of its subnormal numbers; those above are within 2^-4 of themselves."""


def made(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.to(device, dtype)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))  # 8-bit floats know no equality


def check(x: Tensor, group_size: int, codes_dtype: torch.dtype) -> None:
    codes, scales = quantize_groups(x, group_size, codes_dtype, "triton")
    assert (codes.dtype, scales.dtype) == (codes_dtype, torch.float32)
    expected_codes, expected_scales = reference.quantize_groups(x, group_size, codes_dtype)
    assert same(codes, expected_codes)
    assert torch.equal(scales, expected_scales)
    exact = x.double().unflatten(-1, (-1, group_size))
    steps = exact / scales.double()[..., None]
    error = (codes.double().unflatten(-1, (-1, group_size)) - steps).abs()
    relative = 2.0**-4 if codes_dtype == FP8 else 0.0
    rounding = 2 * torch.finfo(torch.float32).eps * steps.abs()  # of the inverse scale and of the product
    assert (error <= torch.maximum(steps.abs() * relative, torch.tensor(HALF_A_STEP[codes_dtype])) + rounding).all()
    limit = LARGEST_CODE[codes_dtype]
    truth = exact.abs().amax(-1).clamp_min(SMALLEST_MAGNITUDE) / limit
    assert ((scales.double() - truth).abs() <= torch.finfo(torch.float32).eps / 2 * truth).all()
    for dtype in DTYPES:
        assert torch.equal(dequantize(codes, scales, dtype, "triton"), reference.dequantize(codes, scales, dtype))


@pytest.mark.parametrize("codes_dtype", [INT8, FP8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group_size"), SHAPES)
def test_codes_and_scales(
    shape: tuple[int, ...], group_size: int, dtype: torch.dtype, codes_dtype: torch.dtype, device: str
) -> None:
    check(made(shape, dtype, device), group_size, codes_dtype)


@pytest.mark.parametrize("codes_dtype", [INT8, FP8])
def test_strided_inputs(codes_dtype: torch.dtype, device: str) -> None:
    x = made((6, 96), torch.bfloat16, device)
    for arranged in (apart(x), padded(x), turned(x)):
        assert not arranged.is_contiguous()
        check(arranged, 32, codes_dtype)
    codes, scales = quantize_groups(x, 32, codes_dtype, "triton")
    assert torch.equal(
        dequantize(padded(codes), padded(scales), kernels="triton"), dequantize(codes, scales, kernels="triton")
    )


@pytest.mark.parametrize("codes_dtype", [INT8, FP8])
def test_zeros_ties_and_extremes(codes_dtype: torch.dtype, device: str) -> None:
    ties = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 63.5])  # steps of one
    rows = torch.stack((torch.zeros(8), -ties, ties, 1e-38 * ties, 1e-31 * ties, 2.6e36 * ties)).to(device)
    check(rows, 8, codes_dtype)
    codes, scales = quantize_rows(rows, codes_dtype, "triton")
    assert (dequantize(codes, scales, kernels="triton")[0] == 0).all()
    assert (codes[2].float().abs().max() == codes[1].float().abs().max() == LARGEST_CODE[codes_dtype]).all()
    if codes_dtype == INT8:
        assert codes[2].tolist() == [127, 0, 2, 2, 0, -2, -126, 64]
    assert scales[0] > 0  # something may divide by it


@pytest.mark.parametrize("codes_dtype", [INT8, FP8])
def test_what_is_not_finite_shows_in_its_group_alone(codes_dtype: torch.dtype, device: str) -> None:
    x = made((3, 64), torch.float32, device)
    spoilt = x.clone()
    spoilt[0, 3], spoilt[1, 40] = torch.nan, -torch.inf
    y = dequantize(*quantize_groups(spoilt, 32, codes_dtype, "triton"), kernels="triton")
    assert not y[0, :32].isfinite().any()
    assert not y[1, 32:].isfinite().any()
    clean = dequantize(*quantize_groups(x, 32, codes_dtype, "triton"), kernels="triton")
    for row, columns in ((0, slice(32, 64)), (1, slice(0, 32)), (2, slice(0, 64))):
        assert torch.equal(y[row, columns], clean[row, columns])


def test_a_row_depends_on_itself_alone(device: str) -> None:
    x = made((70, 64), torch.bfloat16, device)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    codes, scales = quantize_rows(x, INT8, "triton")
    shuffled_codes, shuffled_scales = quantize_rows(x[order], INT8, "triton")
    assert torch.equal(shuffled_codes, codes[order])
    assert torch.equal(shuffled_scales, scales[order])
    padded_codes, padded_scales = quantize_rows(torch.nn.functional.pad(x, (0, 7)), INT8, "triton")
    assert torch.equal(padded_codes[:, :64], codes)
    assert torch.equal(padded_scales, scales)


def test_no_rows(device: str) -> None:
    codes, scales = quantize_groups(torch.empty(0, 64, device=device), 32, INT8, "triton")
    assert (codes.shape, scales.shape) == ((0, 64), (0, 2))
    assert dequantize(codes, scales, kernels="triton").shape == (0, 64)


def test_registration(device: str) -> None:
    x = made((5, 64), torch.bfloat16, device)
    torch.library.opcheck(torch.ops.millrace.quantize.default, (x, 32, INT8))
    codes, scales = quantize_groups(x, 32, INT8, "triton")
    torch.library.opcheck(torch.ops.millrace.dequantize.default, (codes, scales, torch.bfloat16))


@pytest.mark.exhaustive
def test_compiled(device: str) -> None:
    def there_and_back(x: Tensor) -> Tensor:
        return dequantize(*quantize_groups(x, 32, FP8, "triton"), kernels="triton")

    x = made((5, 64), torch.bfloat16, device)
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), there_and_back(x))


def test_auto_runs_the_kernel_where_it_can(device: str) -> None:
    x = made((3, 64), torch.float32, device)
    assert torch.equal(quantize_rows(x)[0], quantize_rows(x, kernels="triton")[0])
    codes, scales = quantize_rows(x.double())
    assert scales.dtype == torch.float64
    assert dequantize(codes, scales, torch.float64).dtype == torch.float64


def test_what_cannot_be_is_refused(device: str) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(KernelError, match=r"kernels take float32, float16 and bfloat16, not torch\.float64"):
        quantize_rows(x.double(), INT8, "triton")
    with pytest.raises(KernelError, match=r"rows of up to 32768 columns in registers, not 32769"):
        quantize_rows(torch.ones(1, MAX_GROUP + 1, device=device), INT8, "triton")
    with pytest.raises(ValueError, match=r"group_size=3 does not divide rows of 8 columns"):
        quantize_groups(x, 3, INT8, "triton")
    with pytest.raises(ValueError, match=r"dtype=torch\.uint8 is not one of torch\.int8, torch\.float8_e4m3fn"):
        quantize_rows(x, torch.uint8, "triton")
    codes, scales = quantize_rows(x, INT8, "triton")
    with pytest.raises(ValueError, match=r"scales have shape \[1, 1\], which fits no codes of shape \[2, 8\]"):
        dequantize(codes, scales[:1], kernels="triton")
    with pytest.raises(KernelError, match=r"kernels take int8 and float8_e4m3fn, not torch\.int32"):
        dequantize(codes.int(), scales, kernels="triton")
