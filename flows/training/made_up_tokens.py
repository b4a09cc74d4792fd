"""Sequences of random tokens, where speed or faults are tried and nothing has to be learnt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flows.data.order import sample_order
from flows.data.packed import Row, row_of


class MadeUpTokens:
    """A small data set in memory: the same for the same arguments, in the order that a run's seed gives.

    Args:
        vocab_size: Tokens are drawn from [0, vocab_size).
        sequence_length: Tokens in a sequence.
        count: Sequences.
    """

    def __init__(self, vocab_size: int, sequence_length: int, count: int) -> None:
        self._tokens = np.random.default_rng(0).integers(0, vocab_size, (count, sequence_length + 1), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        tokens: NDArray[np.int64] = self._tokens[index]
        return tokens

    def row(self, index: int) -> Row:
        """One sequence as inputs and targets, each attending to all before it."""
        return row_of(self[index], None)

    def order(self, start: int, count: int, seed: int) -> NDArray[np.int64]:
        """Indices [count] of the sequences from position `start` of the run on."""
        return sample_order(len(self), start, count, seed)

    def first(self, count: int) -> NDArray[np.int64]:
        """Indices of the first sequences, at most `count`."""
        return np.arange(min(count, len(self)))
