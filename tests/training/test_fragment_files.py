"""What was saved in parts of a matrix is read whole, in other parts, and from any element on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flows.training.fragment_files import PieceReader, UnfitCheckpointError, write_pieces
from flows.training.fragments import WEIGHT
from flows.training.weight_parts import part_of

WHOLE = torch.arange(4 * 8, dtype=torch.float32).view(4, 8)


def reader(directory: Path, parts: int, dim: int, cut_at: int) -> PieceReader:
    """On a matrix in `parts`, each written in two pieces and with one number for all of it."""
    marks = [f"#dim{dim}-part{part}-of-{parts}" for part in range(parts)] if parts > 1 else [""]
    held = {f"w{mark}": part for mark, part in zip(marks, WHOLE.chunk(parts, dim), strict=True)}
    pieces: list[tuple[str, str, int, Tensor]] = []
    for name, part in held.items():
        flat = part.flatten()
        pieces += [(name, WEIGHT, 0, flat[:cut_at]), (name, WEIGHT, cut_at, flat[cut_at:])]
        pieces.append((name, "step", 0, torch.tensor(7.0)))
    paths = write_pieces(directory, "rank", pieces)
    return PieceReader(paths, {name: list(part.shape) for name, part in held.items()})


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("wanted", [1, 2, 4])
def test_any_cut_is_read_at_any_other(tmp_path: Path, saved: int, wanted: int, dim: int) -> None:
    with reader(tmp_path, saved, dim, cut_at=3) as pieces:
        for part in range(wanted):
            name = f"w#dim{dim}-part{part}-of-{wanted}" if wanted > 1 else "w"
            expected = part_of({"w": WHOLE}, name)
            assert expected is not None
            assert pieces.keys(name) == ["step", WEIGHT]
            assert pieces.scalar(name, "step") == 7
            assert pieces.scalar(name, WEIGHT) is None
            target = torch.full((expected.numel() - 3,), torch.nan)
            pieces.read_into(target, name, WEIGHT, 2)
            assert torch.equal(target, expected.flatten()[2:-1])


def test_elements_that_nobody_saved_are_missed(tmp_path: Path) -> None:
    with reader(tmp_path, 1, 0, cut_at=5) as pieces, pytest.raises(UnfitCheckpointError, match="lacks 1 of 4 elements"):
        pieces.read_into(torch.empty(4), "w", WEIGHT, WHOLE.numel() - 3)
