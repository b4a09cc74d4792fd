# Shape letters are upper case.
"""Encoded shards as training sequences, and the order in which an endless stream visits them.

Shape letters: L tokens predicted in a sequence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flows.config.checks import ConfigError
from flows.data.encode import INDEX
from flows.data.order import sample_order

__all__ = ["IGNORED", "PackedDataset", "Row", "Sequences", "map_shards", "row_of", "sample_order"]

IGNORED = -100
"""Target that adds nothing to the loss; torch.nn.functional.cross_entropy's default."""


class Row(NamedTuple):
    """One sequence as a model is trained on it."""

    input_ids_L: NDArray[np.int64]
    targets_L: NDArray[np.int64]
    """`IGNORED` where no loss is taken."""
    document_ids_L: NDArray[np.int64]
    """Number of the token's document within the row; all 0 where documents may look at each other."""


class Sequences(Protocol):
    """A split as sequences of L + 1 tokens, and the order in which they are visited."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Tokens of sequence `index`, int64 [L + 1]."""

    def row(self, index: int) -> Row:
        """Sequence `index` as inputs, targets and documents."""

    def order(self, start: int, count: int, seed: int) -> NDArray[np.int64]:
        """Indices at positions `start` to `start + count` of an endless shuffled stream, int64 [count]."""

    def first(self, count: int) -> NDArray[np.int64]:
        """Indices of at most `count` sequences to evaluate on: none twice, the same ones each time."""


class PackedDataset:
    """A split of a tokens artifact as one stream, cut into sequences; memory-mapped.

    Sequence i holds the stream's tokens from `i * sequence_length` on, with the first token of sequence i + 1 at its
    end, so that each token but the stream's first is predicted once. An incomplete sequence at the end is left out.
    """

    def __init__(self, directory: Path, split: str, sequence_length: int, document_masks: bool = False) -> None:
        """Opens the shards.

        Args:
            directory: Path of the tokens artifact.
            split: `train`, `validation` or `test`.
            sequence_length: Tokens predicted in each sequence.
            document_masks: Whether `row` tells documents apart.

        Raises:
            ConfigError: The split is too short for one sequence.
        """
        self._shards = map_shards(directory, split)
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        num_tokens = int(self._starts[-1])
        if num_tokens <= sequence_length:
            raise ConfigError(
                f"data.sequence_length={sequence_length} needs at least {sequence_length + 1} tokens in the {split} "
                f"split, which has {num_tokens}. Set a shorter sequence_length, give more text or raise the split's "
                "fraction in data.corpus."
            )
        self.sequence_length = sequence_length
        self._num_sequences = (num_tokens - 1) // sequence_length
        self._eos_token_id = read_index(directory)["eos_token_id"] if document_masks else None

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sequence `index`: int64 [sequence_length + 1]."""
        if not 0 <= index < self._num_sequences:
            raise IndexError(f"sequence {index} of {self._num_sequences}")
        first = index * self.sequence_length
        last = first + self.sequence_length + 1
        parts = []
        for number in range(int(np.searchsorted(self._starts, first, "right")) - 1, len(self._shards)):
            start = self._starts[number]
            if start >= last:
                break
            parts.append(self._shards[number][max(first - start, 0) : last - start])
        sequence: NDArray[np.int64] = np.concatenate(parts).astype(np.int64)
        return sequence

    def row(self, index: int) -> Row:
        """Sequence `index` as inputs, targets and documents."""
        return row_of(self[index], self._eos_token_id)

    def order(self, start: int, count: int, seed: int) -> NDArray[np.int64]:
        """Indices at positions `start` to `start + count` of an endless shuffled stream, int64 [count]."""
        return sample_order(len(self), start, count, seed)

    def first(self, count: int) -> NDArray[np.int64]:
        """The indices of the first `count` sequences, or of all."""
        return np.arange(min(count, len(self)))


def row_of(tokens: NDArray[np.int64], eos_token_id: int | None) -> Row:
    """Tokens [L + 1] as inputs, next-token targets and documents.

    Args:
        tokens: A piece of the stream.
        eos_token_id: Token that closes each document, and occurs nowhere else: what follows it starts another one, and
            is not a target, since nothing in the new document tells it. None = the piece counts as one document.
    """
    inputs, targets = tokens[:-1], tokens[1:]
    if eos_token_id is None:
        return Row(inputs, targets, np.zeros_like(inputs))
    closes = inputs == eos_token_id
    return Row(inputs, np.where(closes, IGNORED, targets), np.cumsum(closes) - closes)


def read_index(directory: Path) -> dict[str, Any]:
    """What a tokens artifact says about its shards."""
    index: dict[str, Any] = json.loads((directory / INDEX).read_text())
    return index


def map_shards(directory: Path, split: str) -> list[NDArray[Any]]:
    """The shards of a split of a tokens artifact, memory-mapped, in order."""
    index = read_index(directory)
    return [np.memmap(directory / shard["file"], index["dtype"], "r") for shard in index["splits"][split]["shards"]]
