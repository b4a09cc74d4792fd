"""Mixing by weight: exact shares over any stretch, no state, epochs of each corpus counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.config import ConfigError
from flows.config.data import CorpusConfig, DataConfig, MixedCorpus
from flows.data.mixture import Mixture, schedule
from flows.data.order import sample_order
from flows.data.packed import Row, row_of

Weights = st.lists(st.integers(1, 30), min_size=1, max_size=6)


class Numbers:
    """A corpus whose sequence i is [first + i, first + i + 1]."""

    def __init__(self, first: int, count: int) -> None:
        self.first_number, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self.first_number + index, self.first_number + index + 1])

    def row(self, index: int) -> Row:
        return row_of(self[index], None)

    def order(self, start: int, count: int, seed: int) -> np.ndarray:
        return sample_order(self.count, start, count, seed)

    def first(self, count: int) -> np.ndarray:
        return np.arange(min(count, self.count))


def mixture(sizes: dict[str, int], weights: dict[str, int]) -> Mixture:
    return Mixture({name: Numbers(1000 * i, size) for i, (name, size) in enumerate(sizes.items())}, weights)


@given(weights=Weights)
def test_every_prefix_holds_each_share_within_one(weights: list[int]) -> None:
    turns = schedule(weights)
    taken = np.cumsum(np.eye(len(weights))[turns], axis=0)
    due = np.arange(1, sum(weights) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(taken - due).max() < 1
    assert taken[-1].tolist() == weights  # so that any number of rounds holds it too


@given(weights=Weights, cuts=st.lists(st.integers(0, 40), max_size=6), start=st.integers(0, 300))
def test_the_order_does_not_depend_on_slicing(weights: list[int], cuts: list[int], start: int) -> None:
    mixed = mixture(
        {str(i): 5 + 3 * i for i in range(len(weights))}, {str(i): weight for i, weight in enumerate(weights)}
    )
    whole, parts, position = mixed.order(start, sum(cuts), 7), [np.empty(0, np.int64)], start
    for count in cuts:
        parts.append(mixed.order(position, count, 7))
        position += count
    assert np.array_equal(np.concatenate(parts), whole)


def test_each_corpus_goes_through_its_own_epochs_and_they_are_counted() -> None:
    mixed = mixture({"main": 90, "chat": 10}, {"main": 3, "chat": 1})
    order = mixed.order(0, 120, seed=1)
    chat = order[order >= 90] - 90
    assert len(chat) == 30
    for epoch in range(3):
        assert sorted(chat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert sorted(order[order < 90]) == list(range(90))
    assert mixed.epochs(120) == {"main": 1.0, "chat": 3.0}
    assert mixed.epochs(60) == {"main": 0.5, "chat": 1.5}
    assert not np.array_equal(order, mixed.order(0, 120, seed=2))


def test_indices_find_their_corpus() -> None:
    mixed = mixture({"main": 4, "chat": 3}, {"main": 1, "chat": 1})
    assert [int(mixed[index][0]) for index in range(len(mixed))] == [0, 1, 2, 3, 1000, 1001, 1002]
    assert mixed.row(5).targets_L.tolist() == [1002]
    with pytest.raises(IndexError, match="sequence 7 of 7"):
        mixed[7]


def test_evaluation_reads_the_shares_and_nothing_twice() -> None:
    mixed = mixture({"main": 50, "chat": 4}, {"main": 3, "chat": 1})
    assert len(mixed.first(8)) == 8
    first = mixed.first(1000)
    assert len(set(first.tolist())) == len(first)
    chat = (first >= 50).sum()
    assert chat == 4
    assert abs((len(first) - chat) - 3 * chat) <= 4  # ends where the fifth conversation would have its turn


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture": {"main": MixedCorpus()}}, "data.mixture=\\['main'\\] has a corpus called 'main'"),
        ({"mixture": {"../x": MixedCorpus()}}, "a name is lower case letters"),
        ({"mixture": {"chat": MixedCorpus(weight=0)}}, "data.mixture.chat.weight=0 must be greater than 0"),
        ({"mixture": {"chat": MixedCorpus(weight=99_991)}}, "repeat after 99992 sequences, more than 65536"),
    ],
)
def test_impossible_mixtures_are_refused(settings: dict[str, dict[str, MixedCorpus]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(corpus=CorpusConfig(), **settings)  # type: ignore[arg-type]
