"""Matrices with two zeros in each four weights that follow each other, stored as the two others and their places.

Two bits for each place are what NVIDIA's sparse tensor cores read (arXiv:2104.08378, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP, KEPT = 4, 2
VALUES, PLACES = ".values", ".places"
"""Ends of the names under which a compressed matrix is kept."""
FORMAT = "millrace_2_of_4"
"""Marks such a model in config.json; readers that do not know it refuse it instead of missing weights."""


def compress(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Values and places of a matrix; None for one that would not come back bit for bit.

    Args:
        weight: [N, K], of any dtype.

    Returns:
        Values [N, K / 2], and places, uint8 [N K / 8] rounded up: 4 bits for each group, first place in the lower two,
        first group in the lower half of its byte.
    """
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        return None
    groups = torch.unflatten(weight.detach(), 1, (-1, GROUP))
    if int((groups != 0).sum(-1).max()) > KEPT:
        return None
    places = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :KEPT].sort(-1).values
    values = groups.gather(-1, places).flatten(1)
    halves = (places[..., 0] + GROUP * places[..., 1]).to(torch.uint8).flatten()
    low, high = pad(halves, (0, len(halves) % 2)).view(-1, 2).unbind(1)
    packed = low + 16 * high
    restored = restore(values, packed)
    same = torch.equal(restored, weight) and not bool((torch.signbit(weight) & (weight == 0)).any())
    return (values, packed) if same else None


def restore(values: Tensor, places: Tensor) -> Tensor:
    """The matrix [N, K] that `compress` was given."""
    rows, groups = values.shape[0], values.shape[1] // KEPT
    halves = torch.stack((places % 16, places // 16), -1).flatten()[: rows * groups].view(rows, groups)
    index = torch.stack((halves % GROUP, halves // GROUP), -1).long()
    whole = torch.zeros(rows, groups, GROUP, dtype=values.dtype, device=values.device)
    return whole.scatter_(-1, index, values.view(rows, groups, KEPT)).flatten(1)


def compressed_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to write: matrices of blocks that are 2:4 as values and places, all others as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        packed = compress(tensor) if name.startswith("model.layers.") else None
        found |= {name: tensor} if packed is None else {name + VALUES: packed[0], name + PLACES: packed[1]}
    return found
