"""GPTQ against its definition, optimal brain quantization, and against rounding to the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flows.compression.gptq import gptq
from flows.compression.scale_folding import output_error
from flows.model.affine import Grid, fit_grid


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(rows: int, columns: int) -> Tensor:
    return normal(rows, columns) @ normal(columns, columns, seed=2)


def by_definition(weight: Tensor, gram: Tensor, grid: Grid, order: list[int]) -> Tensor:
    """Each column in turn to its code; those still free move to where the squared error of the outputs is least."""
    free, codes, left = weight.clone(), torch.empty(weight.shape, dtype=torch.int8), list(order)
    while left:
        first = left[0]
        codes[:, first] = grid.codes(free[:, first : first + 1])[:, 0]
        rounded = grid.restore(codes[:, first : first + 1])[:, 0]
        inverse = torch.linalg.inv(gram[left][:, left])
        free[:, left] -= ((free[:, first] - rounded) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_it_is_optimal_brain_quantization_in_a_fixed_order(bits: int, act_order: bool) -> None:
    x, weight = correlated(60, 12), normal(5, 12, seed=3)
    gram = x.t() @ x
    grid, codes = gptq(weight, gram, lambda some: fit_grid(some, bits), None, act_order, damping=0.0)
    order = gram.diagonal().argsort(descending=True).tolist() if act_order else list(range(12))
    assert torch.equal(codes, by_definition(weight, gram, grid, order))
    assert not torch.equal(codes, grid.codes(weight))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_outputs_of_correlated_inputs_keep_more_than_by_rounding_to_the_nearest(
    symmetric: bool, act_order: bool
) -> None:
    x, weight = correlated(600, 160), normal(24, 160, seed=3)  # two blocks of columns, the second cut short
    gram = x.t() @ x

    def fit(some: Tensor) -> Grid:
        return fit_grid(some, 4, 32, symmetric)

    grid, codes = gptq(weight, gram, fit, 32, act_order)
    nearest = fit(weight)
    error = output_error(grid.restore(codes) - weight, gram)
    of_nearest = output_error(nearest.restore(nearest.codes(weight)) - weight, gram)
    assert error < 0.8 * of_nearest  # seen: 0.4 to 0.6
    outputs = ((grid.restore(codes).double() - weight) @ x.t()).square().sum()
    assert error == pytest.approx(float(outputs), rel=1e-9)


def test_inputs_that_are_not_correlated_leave_nothing_to_make_up_for() -> None:
    weight = normal(6, 64)
    grid, codes = gptq(weight, torch.eye(64) * 3, lambda some: fit_grid(some, 4, 32), 32)
    assert torch.equal(codes, fit_grid(weight, 4, 32).codes(weight))
    assert torch.equal(grid.scales, fit_grid(weight, 4, 32).scales)


def test_an_input_that_never_came_keeps_the_nearest_code() -> None:
    x, weight = correlated(60, 8), normal(5, 8, seed=3)
    x[:, 3] = 0
    grid, codes = gptq(weight, x.t() @ x, lambda some: fit_grid(some, 4))
    assert torch.equal(codes[:, 3], grid.codes(weight)[:, 3])
    assert not torch.equal(codes, grid.codes(weight))
