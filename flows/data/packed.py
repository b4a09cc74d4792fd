"""Encoded shards as training sequences, and the order in which an endless stream visits them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.config.checks import ConfigError
from flows.data.encode import INDEX

FEISTEL_ROUNDS = 6


class PackedDataset:
    """A split of a tokens artifact as one stream, cut into sequences; memory-mapped.

    Sequence i holds the stream's tokens from `i * sequence_length` on, with the first token of sequence i + 1 at its
    end, so that each token but the stream's first is predicted once. An incomplete sequence at the end is left out.
    """

    def __init__(self, directory: Path, split: str, sequence_length: int) -> None:
        """Opens the shards.

        Args:
            directory: Path of the tokens artifact.
            split: `train`, `validation` or `test`.
            sequence_length: Tokens predicted in each sequence.

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


def map_shards(directory: Path, split: str) -> list[NDArray[Any]]:
    """The shards of a split of a tokens artifact, memory-mapped, in order."""
    index = json.loads((directory / INDEX).read_text())
    return [np.memmap(directory / shard["file"], index["dtype"], "r") for shard in index["splits"][split]["shards"]]


def sample_order(num_sequences: int, start: int, count: int, seed: int) -> NDArray[np.int64]:
    """Sequence indices at positions `start` to `start + count` of an endless stream, int64 [count].

    Epoch follows epoch, each a permutation of all sequences that `seed` and the epoch's number decide. Every position
    is computed on its own, in memory for `count` alone: the order does not depend on ranks or on how it is sliced.
    """
    positions = np.arange(start, start + count, dtype=np.int64)
    order = np.empty(count, np.int64)
    for epoch in range(start // num_sequences, (start + count - 1) // num_sequences + 1):
        inside = positions // num_sequences == epoch
        order[inside] = _permuted(positions[inside] % num_sequences, num_sequences, seed, epoch)
    return order


def _permuted(values: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The values under a permutation of 0..size-1: a Feistel network over the next power of four, walked until inside.

    Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """
    keys = np.random.SeedSequence([seed, epoch]).generate_state(FEISTEL_ROUNDS, np.uint64)
    half_bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    permuted = values.astype(np.uint64)
    outside = np.arange(len(permuted))
    while len(outside):
        left, right = permuted[outside] >> half_bits, permuted[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        permuted[outside] = (left << half_bits) | right
        outside = outside[permuted[outside] >= size]
    return permuted.astype(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of each value: the finalizer of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
