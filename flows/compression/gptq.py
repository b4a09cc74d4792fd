"""Codes of a matrix chosen column by column, where later columns make up for what rounding did to earlier ones.

GPTQ (arXiv:2210.17323): rounding weight w_i to q_i moves those that are still free by -(w_i - q_i) / [H^-1]_ii times
row i of H^-1, which is the exact best answer for the squared error of the outputs (optimal brain quantization,
arXiv:2208.11580) where columns come in a fixed order. Its steps are the rows of the Cholesky factor of H^-1.

Shape letters: N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flows.model.affine import Grid

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it; the paper's."""
BLOCK_COLUMNS = 128
"""Columns whose effect on later ones is added up before it is applied; the paper's."""


@torch.no_grad()
def gptq(
    weight: Tensor,
    gram: Tensor,
    fit: Callable[[Tensor], Grid],
    group_size: int | None = None,
    act_order: bool = False,
    damping: float = DAMPING,
) -> tuple[Grid, Tensor]:
    """The grid of a matrix and codes with little error in what it computes.

    Args:
        weight: [N, K].
        gram: Sum over the calibration data of products of inputs with each other, X^T X [K, K].
        fit: The grid for some columns [N, K or G]; with groups and without `act_order` it is chosen when a group's turn
            comes, for the weights as they are then.
        group_size: Columns that share a scale; None = all.
        act_order: Columns in falling order of the sum of their squared inputs, on grids that are chosen beforehand.
        damping: Share of the mean of the diagonal of `gram` that is added to it.

    Returns:
        The grid, and codes [N, K] as int8.
    """
    free = weight.detach().double().clone()
    hessian = gram.double().clone()
    unused = hessian.diagonal() == 0  # an input that never came: nothing makes up for it, and nothing has to
    hessian.diagonal()[unused] = 1.0
    columns = free.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    order = order.to(weight.device)
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    steps = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)

    size = group_size or columns
    chosen = group_size is None or act_order
    grid = fit(weight)
    codes = torch.empty(free.shape, dtype=torch.int8, device=weight.device)
    for first in range(0, columns, BLOCK_COLUMNS):
        last = min(first + BLOCK_COLUMNS, columns)
        errors = torch.zeros_like(free[:, first:last])
        for place in range(first, last):
            column = int(order[place])
            group = column // size
            if not chosen and column % size == 0:
                later = steps[first:place, column : column + size]
                grid = _with_group(
                    grid, group, fit(free[:, column : column + size] - errors[:, : place - first] @ later)
                )
            wanted = free[:, column] - errors[:, : place - first] @ steps[first:place, place]
            narrow = grid.columns(slice(group, group + 1))
            code = narrow.codes(wanted[:, None].to(weight.dtype))
            codes[:, column] = code[:, 0]
            errors[:, place - first] = (wanted - narrow.restore(code)[:, 0]) / steps[place, place]
        rest = order[last:]
        free[:, rest] -= errors @ steps[first:last, last:]
    return grid, codes


def _with_group(grid: Grid, group: int, fitted: Grid) -> Grid:
    grid.scales[:, group] = fitted.scales[:, 0]
    if grid.zeros is not None and fitted.zeros is not None:
        grid.zeros[:, group] = fitted.zeros[:, 0]
    return grid
