"""Affine codes of few bits: x = (code - zero) * scale, with one scale for a tensor, a row, or a group of columns.

Shape letters: N rows, K columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

INT4_SCALE_DTYPE = torch.bfloat16
"""Of scales in a file: a GPU's dtype of activations, exact in float32, and codes are chosen for what is stored."""
SHRINKS = 10
"""How many narrower grids `search` tries."""
LEAST_SHRINK = 0.6
"""The narrowest, of the whole range: what lies outside is cut off."""


@dataclass(frozen=True)
class Grid:
    """Numbers that codes can stand for."""

    bits: int
    scales: Tensor
    """Step of each row and group of columns [N, G]; a single group is a scale per row, a single row one per tensor."""
    zeros: Tensor | None
    """Code that stands for zero [N, G], in the dtype of the scales; None = 0 (symmetric)."""

    @property
    def largest_code(self) -> int:
        """Codes are signed; where zero is code 0 they are symmetric too, and the lowest of all stays unused."""
        return int(2 ** (self.bits - 1)) - 1

    def codes(self, x: Tensor) -> Tensor:
        """Nearest codes (ties to even) of numbers [N, K], int8."""
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = (torch.unflatten(x.to(wide), 1, (self.scales.shape[1], -1)) / self.scales.to(wide)[..., None]).round()
        least = -self.largest_code
        if self.zeros is not None:
            steps, least = steps + self.zeros.to(wide)[..., None], least - 1
        return steps.clamp(least, self.largest_code).to(torch.int8).flatten(1)

    def restore(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, in float32 or wider."""
        wide = torch.promote_types(self.scales.dtype, torch.float32)
        steps = torch.unflatten(codes.to(wide), 1, (self.scales.shape[1], -1))
        if self.zeros is not None:
            steps = steps - self.zeros.to(wide)[..., None]
        return (steps * self.scales.to(wide)[..., None]).flatten(1)

    def columns(self, groups: slice) -> Grid:
        """The grid of some of the groups."""
        return replace(self, scales=self.scales[:, groups], zeros=None if self.zeros is None else self.zeros[:, groups])


def fit_grid(
    x: Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    search: bool = False,
    gram: Tensor | None = None,
) -> Grid:
    """The grid that spans the numbers of each group; zero is always one of its numbers.

    Args:
        x: Numbers [N, K].
        bits: Of a code, 2 to 8.
        group_size: Columns that share a scale, which divides K; None = all of a row.
        symmetric: Steps of max |x| / (2^(bits - 1) - 1) around zero; else all 2^bits codes from min to max.
        scale_dtype: What scales are rounded to before anything else, as they will be stored.
        search: Whether to narrow each group's grid to where the sum of squared errors is least.
        gram: Products X^T X [K, K] of what the numbers are multiplied with: those errors are then of each group's
            products, not of its numbers (weight clipping of AWQ, arXiv:2306.00978); None = of the numbers.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = torch.unflatten(x.detach().to(wide), 1, (-1, group_size or x.shape[1]))
    low, high = groups.amin(-1), groups.amax(-1)
    best = _spanning(low, high, bits, symmetric, scale_dtype)
    if not search:
        return best
    blocks = None if gram is None else _blocks(gram.to(wide), groups.shape[1])
    least = _squared_errors(x, best, blocks)
    for number in range(1, SHRINKS + 1):
        share = 1 - (1 - LEAST_SHRINK) * number / SHRINKS
        tried = _spanning(low * share, high * share, bits, symmetric, scale_dtype)
        errors = _squared_errors(x, tried, blocks)
        better = errors < least
        least = torch.where(better, errors, least)
        zeros = None if best.zeros is None or tried.zeros is None else torch.where(better, tried.zeros, best.zeros)
        best = Grid(bits, torch.where(better, tried.scales, best.scales), zeros)
    return best


def _spanning(low: Tensor, high: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> Grid:
    tiny = torch.finfo(scale_dtype).tiny
    largest = 2 ** (bits - 1) - 1
    if symmetric:
        scales = torch.maximum(-low, high) / largest
        return Grid(bits, scales.to(scale_dtype).clamp_min(tiny), None)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scales = ((high - low) / (2**bits - 1)).to(scale_dtype).clamp_min(tiny)
    zeros = (-low / scales.to(low.dtype)).round().clamp(0, 2**bits - 1) - largest - 1
    return Grid(bits, scales, zeros.to(scale_dtype))


def _blocks(gram: Tensor, groups: int) -> Tensor:
    """Products of the columns of each group with each other [G, K / G, K / G]."""
    return (
        torch.unflatten(torch.unflatten(gram, 1, (groups, -1)), 0, (groups, -1)).diagonal(dim1=0, dim2=2).movedim(2, 0)
    )


def _squared_errors(x: Tensor, grid: Grid, blocks: Tensor | None) -> Tensor:
    error = torch.unflatten(grid.restore(grid.codes(x)) - x, 1, (grid.scales.shape[1], -1))
    weighed = error if blocks is None else torch.einsum("ngi,gij->ngj", error, blocks)
    return (weighed * error).sum(-1)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of 4 or 8 bits, shifted to be unsigned, in words of 32 bits; the first lies in the lowest bits.

    The layout of `weight_packed` in compressed-tensors. A last word that is cut short is filled up with zeros.

    Args:
        codes: int8 [N, K].
        bits: 4 or 8.

    Returns:
        int32 [N, ceil(K bits / 32)].
    """
    per_word = 32 // bits
    shifted = codes.to(torch.int64) + 2 ** (bits - 1)
    filled = torch.unflatten(pad(shifted, (0, -codes.shape[1] % per_word)), 1, (-1, per_word))
    words = (filled << torch.arange(0, 32, bits, device=codes.device)).sum(-1)
    return words.to(torch.int32)  # keeps the low 32 bits


def unpack_int32(words: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack_int32` was given, int8 [N, K].

    Args:
        words: int32 [N, ceil(K bits / 32)].
        bits: 4 or 8.
        columns: K.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes: Tensor = ((words[..., None] >> shifts) & (2**bits - 1)) - 2 ** (bits - 1)
    return codes.flatten(1)[:, :columns].to(torch.int8)
