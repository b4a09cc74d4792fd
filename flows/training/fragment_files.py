# safetensors has few types:
# mypy: disable-error-code="no-untyped-call"
"""Fragments of parameters on disk: safetensors files of bounded size, read back at any cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file  # torch's refuses several parts of one tensor
from torch import Tensor

from flows.artifact import flush_to_disk
from flows.config import RunError
from flows.training.fragments import WEIGHT, Fragment
from flows.training.weight_parts import joined, part_of, whole_name

FILE_BYTES = 2**30
"""A file is closed once it has this much; no file is much larger unless one tensor is."""

Piece = tuple[str, str, int, Tensor]
"""Parameter, key of the tensor, position of its first element within the flattened parameter, values [any] or []."""


class UnfitCheckpointError(RunError):
    """A checkpoint does not hold what this model needs."""


def pieces_of(fragments: Iterable[Fragment], copy: bool = False) -> Iterator[Piece]:
    """All tensors of the fragments, one after another, on the CPU.

    Args:
        fragments: What to take apart.
        copy: Whether tensors that are on the CPU already are copied too, so that training can change them.
    """
    for fragment in fragments:
        for key, tensor in fragment.tensors():
            yield fragment.name, key, fragment.start, tensor.to("cpu", copy=copy)


def write_pieces(directory: Path, stem: str, pieces: Iterable[Piece]) -> list[Path]:
    """Writes `<stem>-<n>.safetensors` files and flushes them to disk; their paths."""
    paths: list[Path] = []
    for number, tensors in enumerate(_by_size(pieces)):
        path = directory / f"{stem}-{number:05d}.safetensors"
        save_file(tensors, path)
        flush_to_disk(path)
        paths.append(path)
    return paths


def _by_size(pieces: Iterable[Piece]) -> Iterator[dict[str, NDArray[Any]]]:
    waiting: dict[str, NDArray[Any]] = {}
    waiting_bytes = 0
    for name, key, start, tensor in pieces:
        waiting[f"{name}|{key}|{start}"] = tensor.numpy()
        waiting_bytes += tensor.nbytes
        if waiting_bytes >= FILE_BYTES:
            yield waiting
            waiting, waiting_bytes = {}, 0
    yield waiting


class PieceReader:
    """Reads elements of parameters and their optimizer state, wherever the ranks that wrote them had cut.

    What tensor parallelism had cut otherwise than it is cut now is put together first, one tensor at a time.

    Args:
        paths: Files of a checkpoint.
        shapes: Shape of each parameter or part in them, by name.
    """

    def __init__(self, paths: Iterable[Path], shapes: Mapping[str, Sequence[int]]) -> None:
        self._open = ExitStack()
        self._shapes = shapes
        self._parts: dict[str, list[str]] = defaultdict(list)
        for name in shapes:
            self._parts[whole_name(name)].append(name)
        self._whole: tuple[tuple[str, str], Tensor] | None = None
        self._pieces: dict[str, dict[str, list[tuple[int, str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for path in paths:
            file = self._open.enter_context(safe_open(path, framework="pt"))
            for entry in file.keys():  # noqa: SIM118  no mapping, whatever it looks like
                name, key, start = entry.rsplit("|", 2)
                self._pieces[name][key].append((int(start), entry, file))

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def keys(self, name: str) -> list[str]:
        """Keys of the tensors that belong to a parameter, or to a part of one."""
        return sorted(self._pieces[self._saved(name)])

    def scalar(self, name: str, key: str) -> Tensor | None:
        """The value [] if the state is one number; None if it is as large as the parameter."""
        _, entry, file = self._pieces[self._saved(name)][key][0]
        return None if file.get_slice(entry).get_shape() else file.get_tensor(entry)

    def read_into(self, target: Tensor, name: str, key: str, start: int) -> None:
        """Fills `target` with elements that were saved.

        Args:
            target: [numel].
            name: Of the parameter.
            key: Of its state, such as a moment.
            start: First element, of the flattened parameter.

        Raises:
            UnfitCheckpointError: An element is in none of the files.
        """
        if self._saved(name) != name:
            target.copy_(self._cut_again(name, key)[start : start + target.numel()])
            return
        missing = target.numel()
        for first, entry, file in self._pieces[name][key]:
            saved = file.get_slice(entry)
            begin, end = max(start, first), min(start + target.numel(), first + saved.get_shape()[0])
            if begin < end:
                target[begin - start : end - start].copy_(saved[begin - first : end - first])
                missing -= end - begin
        if missing:
            raise UnfitCheckpointError(f"{key} of {name} lacks {missing} of {target.numel()} elements")

    def _saved(self, name: str) -> str:
        """The name itself if it was saved under it; else that of a part of the same parameter, or of the whole."""
        return name if name in self._shapes else next(iter(self._parts[whole_name(name)]), name)

    def _cut_again(self, name: str, key: str) -> Tensor:
        """All elements [any] of a parameter or part that was saved in other parts, or whole."""
        base = whole_name(name)
        if self._whole is None or self._whole[0] != (base, key):
            parts = {}
            for saved in self._parts[base]:
                parts[saved] = torch.empty(*self._shapes[saved])
                self.read_into(parts[saved].view(-1), saved, key, 0)
            self._whole = (base, key), joined(parts)[base]
        part = part_of({base: self._whole[1]}, name)
        assert part is not None
        return part.flatten()


def restore(fragments: Iterable[Fragment], reader: PieceReader, scalar_device: torch.device | str) -> None:
    """Fills fragments and their optimizer state with what was saved, one tensor at a time.

    Args:
        fragments: All that this rank holds.
        reader: Open on all files of the checkpoint.
        scalar_device: Where the optimizer wants tensors that are one number.

    Raises:
        UnfitCheckpointError: Something is missing.
    """
    for fragment in fragments:
        for key in reader.keys(fragment.name):
            if key == WEIGHT:
                reader.read_into(fragment.part(fragment.flat), fragment.name, key, fragment.start)
                continue
            number = reader.scalar(fragment.name, key)
            if number is None:
                if key not in fragment.state:  # the first fragment of its flat tensor
                    fragment.state[key] = torch.zeros_like(fragment.flat, requires_grad=False)
                reader.read_into(fragment.part(fragment.state[key]), fragment.name, key, fragment.start)
            else:  # float32 in torch's optimizers; Python numbers were widened when they were saved
                fragment.state[key] = number.to(scalar_device) if number.dtype == torch.float32 else number.item()
