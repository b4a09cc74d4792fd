# Shape letters are upper case.
"""Sequences of whole documents, with a mask of the tokens that count: what conversations are trained on.

Shape letters: L tokens predicted in a sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.config.checks import require
from flows.data.order import sample_order
from flows.data.packed import IGNORED, Row, map_shards, read_index


class WholeDocuments:
    """A split of a tokens artifact, no document of which is cut in two.

    Each sequence of L + 1 tokens takes as many of the next documents as fit; the rest is filled with end-of-text
    tokens that do not count. Shards and masks are memory-mapped; 24 bytes for each sequence are held.
    """

    def __init__(self, directory: Path, split: str, sequence_length: int, document_masks: bool = False) -> None:
        """Opens the shards.

        Args:
            directory: Path of the tokens artifact.
            split: `train`, `validation` or `test`.
            sequence_length: Tokens predicted in each sequence; a longer document is cut.
            document_masks: Whether `row` tells documents apart.

        Raises:
            ConfigError: The split is empty.
        """
        index = read_index(directory)
        self._shards = map_shards(directory, split)
        self._loss = map_loss_masks(directory, split)
        self._starts = [
            np.append(np.load(directory / shard["file"].replace(".bin", ".documents.npy")), shard["tokens"])
            for shard in index["splits"][split]["shards"]
        ]
        self.sequence_length = sequence_length
        self._document_masks = document_masks
        self._eos_token_id = index["eos_token_id"]
        self._sequences = np.array(
            [
                (number, *documents)
                for number, starts in enumerate(self._starts)
                for documents in _filled(starts, sequence_length + 1)
            ],
            np.int64,
        ).reshape(-1, 3)
        require(
            len(self._sequences) > 0,
            f"data.corpus.{split}_fraction" if split != "train" else "data.corpus.paths",
            f"the {split} split",
            "holds no conversation",
            "Give more conversations, or a larger share to the split.",
        )

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Tokens of sequence `index`, int64 [L + 1]."""
        return self._read(index)[0]

    def row(self, index: int) -> Row:
        """Sequence `index` as inputs, targets and documents."""
        tokens, counts, documents = self._read(index)
        if not self._document_masks:
            documents = np.zeros_like(documents)
        return Row(tokens[:-1], np.where(counts[1:] != 0, tokens[1:], IGNORED), documents[:-1])

    def order(self, start: int, count: int, seed: int) -> NDArray[np.int64]:
        """Indices at positions `start` to `start + count` of an endless shuffled stream, int64 [count]."""
        return sample_order(len(self), start, count, seed)

    def first(self, count: int) -> NDArray[np.int64]:
        """The indices of the first `count` sequences, or of all."""
        return np.arange(min(count, len(self)))

    def _read(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
        """Tokens, whether each counts, and the number of its document, all [L + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        shard, first, last = self._sequences[index]
        starts = self._starts[shard]
        length = min(int(starts[last] - starts[first]), self.sequence_length + 1)
        part = slice(starts[first], starts[first] + length)
        tokens = np.full(self.sequence_length + 1, self._eos_token_id, np.int64)
        counts = np.zeros(self.sequence_length + 1, np.uint8)
        documents = np.full(self.sequence_length + 1, last - first, np.int64)
        tokens[:length] = self._shards[shard][part]
        counts[:length] = self._loss[shard][part]
        documents[:length] = np.searchsorted(starts, np.arange(part.start, part.stop), "right") - 1 - first
        return tokens, counts, documents


def _filled(starts: NDArray[np.int64], capacity: int) -> list[tuple[int, int]]:
    """First document and the one after the last of each sequence.

    Args:
        starts: First token of each document of a shard, and the number of tokens at the end.
        capacity: Tokens that a sequence holds.
    """
    sequences, first = [], 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + capacity, "right")) - 1
        last = max(last, first + 1)
        sequences.append((first, last))
        first = last
    return sequences


def map_loss_masks(directory: Path, split: str) -> list[NDArray[Any]]:
    """Which tokens of each shard count, uint8, memory-mapped, in the order of the shards."""
    shards = read_index(directory)["splits"][split]["shards"]
    return [np.memmap(directory / shard["file"].replace(".bin", ".loss.bin"), np.uint8, "r") for shard in shards]
