"""Codes of few bits: no further from a number than half a step, exact where they promise to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flows.compression.int8 import sqnr_db
from flows.model.affine import fit_grid, pack_int32, unpack_int32


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_number_is_further_than_half_a_step_from_its_code(
    bits: int, symmetric: bool, group_size: int | None
) -> None:
    x = normal(7, 96)
    x[:, 3] = x[2] = 0
    grid = fit_grid(x, bits, group_size, symmetric)
    codes = grid.codes(x)
    assert codes.dtype == torch.int8
    assert -(2 ** (bits - 1)) + symmetric <= int(codes.min()) <= int(codes.max()) <= 2 ** (bits - 1) - 1
    step = grid.scales.repeat_interleave(group_size or 96, 1)
    # rounding a zero point cuts off up to half a step at an end; 2^bits steps in float32 round by less than 1e-4 of one
    slack = 1e-4 + (0 if symmetric else 0.5)
    assert ((grid.restore(codes) - x).abs() <= (0.5 + slack) * step).all()
    assert (grid.restore(codes)[x == 0] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_one_of_the_numbers_also_where_all_lie_on_one_side_of_it(sign: int) -> None:
    x = sign * torch.linspace(5, 6, 8)[None]
    grid = fit_grid(x, 4, symmetric=False)
    assert torch.allclose(grid.scales, torch.tensor(6 / 15))
    assert float(grid.restore(grid.codes(torch.zeros(1, 8))).abs().max()) == 0
    assert float((grid.restore(grid.codes(x)) - x).abs().max()) <= 0.51 * 6 / 15


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_is_divided_by_zero_where_all_numbers_are_zero(symmetric: bool) -> None:
    assert float(fit_grid(torch.zeros(1, 8), 4, symmetric=symmetric).scales) > 0


def test_a_tensor_a_row_or_a_group_has_one_scale() -> None:
    x = normal(4, 64)
    assert fit_grid(x.reshape(1, -1), 8).scales.shape == (1, 1)
    assert torch.equal(fit_grid(x, 8).scales[:, 0], x.abs().amax(1) / 127)
    assert torch.equal(fit_grid(x, 4, 32).scales, x.view(4, 2, 32).abs().amax(-1) / 7)


def test_codes_are_chosen_for_the_scale_that_is_stored() -> None:
    x = normal(16, 64)
    grid = fit_grid(x, 4, 32, scale_dtype=torch.bfloat16)
    assert grid.scales.dtype == torch.bfloat16
    step = grid.scales.float().repeat_interleave(32, 1)
    cut_off = 7 * 2.0**-9  # what rounding a scale down to 8 bits leaves beyond the last of 7 steps
    assert ((grid.restore(grid.codes(x)) - x).abs() <= (0.5 + cut_off) * step).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_searching_for_the_scale_never_loses_and_gains_where_one_weight_sticks_out(symmetric: bool) -> None:
    x = normal(32, 128)
    x[:, ::32] *= 1.5
    plain, searched = (fit_grid(x, 4, 32, symmetric, search=search) for search in (False, True))

    def errors(grid: object) -> Tensor:
        return (grid.restore(grid.codes(x)) - x).square().view(32, 4, 32).sum(-1)

    assert (errors(searched) <= errors(plain)).all()
    gain = sqnr_db(x, searched.restore(searched.codes(x))) - sqnr_db(x, plain.restore(plain.codes(x)))
    assert gain > 0.2  # dB; seen: 0.5 for symmetric grids, 0.23 for others


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 8, 45])
def test_packed_codes_are_the_codes_exactly(bits: int, columns: int) -> None:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (5, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(unpack_int32(pack_int32(codes, bits), bits, columns), codes)
    assert pack_int32(codes, bits).shape == (5, -(-columns * bits // 32))


def test_words_hold_codes_from_their_lowest_bits_on_without_a_sign() -> None:
    nibbles = pack_int32(torch.arange(-8, 8)[None].to(torch.int8), 4)
    assert [int(word) % 2**32 for word in nibbles[0]] == [0x76543210, 0xFEDCBA98]
    octets = pack_int32(torch.tensor([[-128, -127, 0, 127]], dtype=torch.int8), 8)
    assert int(octets) % 2**32 == 0xFF800100
