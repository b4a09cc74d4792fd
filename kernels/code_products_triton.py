# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""What the matrix products of quantized weights share: choosing tiles, dividing long sums, and what follows a sum.

Tokens too few to fill a GPU divide the sum over K among programs. Each split stores its part; a second kernel adds the
parts in a fixed order: the same bits on every run.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_constants import processors

MAX_SPLITS = 8
SPLIT_ROWS = 64
"""Most tokens for which parts of sums may be written and read once more."""
_NUMBERS = 512
"""Sums that one program finishes."""


class Tile(NamedTuple):
    """Part of the result that a program computes, and how."""

    rows: int
    """Tokens."""
    channels: int
    columns: int
    """Of K in one step."""
    warps: int
    stages: int

    def tiles(self, num_rows: int, num_channels: int) -> int:
        """How many of them the result has."""
        return -(-num_rows // self.rows) * -(-num_channels // self.channels)


def choose_tile(tiles: Sequence[Tile], num_rows: int, num_channels: int, device: torch.device) -> Tile:
    """The first tile that holds all tokens, else the last that keeps every processor busy, else the last but one.

    Args:
        tiles: From small to large.
        num_rows: Tokens.
        num_channels: N.
        device: Of the tensors.
    """
    for tile in tiles:
        if num_rows <= tile.rows:
            return tile
    large = tiles[2:]
    busy = [tile for tile in large if tile.tiles(num_rows, num_channels) >= processors(device)]
    return (busy or large[:1])[-1]


@triton.jit
def finished(sums, row_scales_ptr, channel_scales_ptr, bias_ptr, rows, channels, num_rows, num_channels):
    """Float32 results of sums, each of which has its row and its channel."""
    y = sums.to(tl.float32)
    if channel_scales_ptr is not None:
        y = y * tl.load(channel_scales_ptr + channels, mask=channels < num_channels, other=0.0)
        y = y * tl.load(row_scales_ptr + rows, mask=rows < num_rows, other=0.0)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + channels, mask=channels < num_channels, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _add_splits(
    parts_ptr, row_scales_ptr, channel_scales_ptr, bias_ptr, y_ptr, num_rows, num_channels,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    num_sums = num_rows * num_channels  # few: products are divided only where tiles are
    inside = place < num_sums
    sums = tl.load(parts_ptr + place, mask=inside)  # [BLOCK]
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(parts_ptr + split * num_sums + place, mask=inside)
    rows, channels = place // num_channels, place % num_channels
    y = finished(sums, row_scales_ptr, channel_scales_ptr, bias_ptr, rows, channels, num_rows, num_channels)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


def choose_splits(tiles: int, num_rows: int, steps: int, device: torch.device) -> int:
    """In how many parts the sum is divided: a power of two that gives processors one and a half programs each.

    Args:
        tiles: Tiles of the result.
        num_rows: Tokens.
        steps: Of the loop over K; a split keeps two or more.
        device: Of the tensors.
    """
    splits = 1
    while num_rows <= SPLIT_ROWS and splits < MAX_SPLITS and splits * tiles < 1.5 * processors(device):
        if steps < 4 * splits:
            break
        splits *= 2
    return splits


def add_splits(
    parts: Tensor, y: Tensor, row_scales: Tensor | None, channel_scales: Tensor | None, bias: Tensor | None
) -> None:
    """Writes the sum of the parts, scaled and with the bias added.

    Args:
        parts: float32 or int32 [splits, M, N].
        y: Where it goes [M, N].
        row_scales: float32 [M], together with `channel_scales`.
        channel_scales: float32 [N].
        bias: [N].
    """
    splits, num_rows, num_channels = parts.shape
    _add_splits[(triton.cdiv(y.numel(), _NUMBERS),)](
        parts, row_scales, channel_scales, bias, y, num_rows, num_channels, SPLITS=splits, BLOCK=_NUMBERS
    )
