"""Several corpora as one: each has its exact share of any stretch of the stream, and no state is needed to know it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flows.config.data import MAIN
from flows.data.encode import corpus_dir
from flows.data.labelled_documents import LabelledDocuments
from flows.data.packed import PackedDataset, Row, Sequences, read_index
from flows.data.whole_documents import WholeDocuments


class Mixture:
    """The sequences of several corpora, end to end, visited in shares set by weights.

    Each corpus is an endless shuffled stream of its own, epoch after epoch. `schedule` says whose turn it is, over and
    over. A corpus that is small for its weight comes to its second epoch sooner; `epochs` says how often it was seen.
    """

    def __init__(self, corpora: Mapping[str, Sequences], weights: Mapping[str, int]) -> None:
        self._names = list(weights)
        self._corpora = [corpora[name] for name in self._names]
        self._starts = np.cumsum([0, *(len(corpus) for corpus in self._corpora)])
        divisor = math.gcd(*weights.values())
        self._weights = [weight // divisor for weight in weights.values()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Tokens of sequence `index`, int64 [L + 1]."""
        corpus, inside = self._find(index)
        return corpus[inside]

    def row(self, index: int) -> Row:
        """Sequence `index` as inputs, targets and documents."""
        corpus, inside = self._find(index)
        return corpus.row(inside)

    def order(self, start: int, count: int, seed: int) -> NDArray[np.int64]:
        """Indices at positions `start` to `start + count` of an endless shuffled stream, int64 [count]."""
        order = np.empty(count, np.int64)
        turns = self._turns(start, count)
        for number, corpus in enumerate(self._corpora):
            mine = turns == number
            if mine.any():
                done = self._taken(start)[number]
                order[mine] = self._starts[number] + corpus.order(done, int(mine.sum()), seed)
        return order

    def first(self, count: int) -> NDArray[np.int64]:
        """Indices of at most `count` sequences in the corpora's shares, until one of them has no more."""
        turns = self._turns(0, count)
        ends = [count]
        order = np.empty(count, np.int64)
        for number, corpus in enumerate(self._corpora):
            places = np.flatnonzero(turns == number)
            first = corpus.first(len(places))
            order[places[: len(first)]] = self._starts[number] + first
            if len(first) < len(places):
                ends.append(int(places[len(first)]))
        return order[: min(ends)]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` of the stream have visited each corpus, by name."""
        taken = self._taken(samples)
        return {
            name: round(int(number) / len(corpus), 3)
            for name, number, corpus in zip(self._names, taken, self._corpora, strict=True)
        }

    @cached_property
    def _schedule(self) -> NDArray[np.int32]:
        return schedule(self._weights)

    def _turns(self, start: int, count: int) -> NDArray[np.int32]:
        turns: NDArray[np.int32] = self._schedule[np.arange(start, start + count) % len(self._schedule)]
        return turns

    def _taken(self, position: int) -> NDArray[np.int64]:
        """Sequences of each corpus before a position of the stream."""
        rounds, rest = divmod(position, len(self._schedule))
        inside = np.bincount(self._schedule[:rest], minlength=len(self._weights))
        return rounds * np.array(self._weights, np.int64) + inside

    def _find(self, index: int) -> tuple[Sequences, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._corpora[number], index - int(self._starts[number])


def schedule(weights: list[int]) -> NDArray[np.int32]:
    """Whose turn it is at each position of a round, int32 [sum of weights]; corpus i has weights[i] turns.

    Every beginning of the endless repetition holds each corpus's share to within less than one turn. Of those that
    may have the next turn without getting ahead by a whole one, it goes to the one that must have it first.
    Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980.
    """
    total, slack = sum(weights), max(1, 2 * len(weights) - 2)
    taken = [0] * len(weights)
    turns = np.empty(total, np.int32)
    for position in range(1, total + 1):
        ready = [i for i, weight in enumerate(weights) if (position * weight - taken[i] * total) * slack >= total]
        chosen = ready[0]
        for i in ready[1:]:  # (taken + 1 - 1 / slack) / weight is when its turn is due, in rounds; in whole numbers
            if ((taken[i] + 1) * slack - 1) * weights[chosen] < ((taken[chosen] + 1) * slack - 1) * weights[i]:
                chosen = i
        taken[chosen] += 1
        turns[position - 1] = chosen
    return turns


def open_split(
    directory: Path,
    split: str,
    sequence_length: int,
    document_masks: bool = False,
    weights: Mapping[str, int] | None = None,
) -> Sequences:
    """A split of a tokens artifact as training sequences.

    Args:
        directory: Path of the tokens artifact: the main corpus, and below it one directory for each further one.
        split: `train`, `validation` or `test`.
        sequence_length: Tokens predicted in each sequence.
        document_masks: Whether documents are told apart.
        weights: Of each corpus by name, when there are several.

    Raises:
        ConfigError: A split is too short for one sequence.
    """
    if not weights:
        index = read_index(directory)
        if "labels" in index:
            return LabelledDocuments(directory, split, sequence_length)
        kind = WholeDocuments if index.get("whole_documents") else PackedDataset
        return kind(directory, split, sequence_length, document_masks)
    corpora = {
        name: open_split(corpus_dir(directory, name), split, sequence_length, document_masks) for name in weights
    }
    return Mixture(corpora, weights)


def epochs(dataset: Sequences, samples: int) -> dict[str, float]:
    """How often the first `samples` of the stream have visited each corpus, by name."""
    return dataset.epochs(samples) if isinstance(dataset, Mixture) else {MAIN: round(samples / len(dataset), 3)}
