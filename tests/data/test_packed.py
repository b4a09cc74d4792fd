from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.artifact import Artifact
from flows.config import ConfigError
from flows.data.packed import IGNORED, PackedDataset, map_shards, sample_order


@pytest.mark.parametrize("sequence_length", [8, 61, 25_000])
def test_every_token_is_predicted_once_across_shards(email_chain: dict[str, Artifact], sequence_length: int) -> None:
    tokens = email_chain["tokens"].path
    stream = np.concatenate(map_shards(tokens, "train")).astype(np.int64)
    dataset = PackedDataset(tokens, "train", sequence_length)
    sequences = [dataset[index] for index in range(len(dataset))]
    assert all(sequence.shape == (sequence_length + 1,) and sequence.dtype == np.int64 for sequence in sequences)
    assert np.array_equal(
        np.concatenate([sequence[:-1] for sequence in sequences]), stream[: len(sequences) * sequence_length]
    )
    assert np.array_equal(
        np.concatenate([sequence[1:] for sequence in sequences]), stream[1 : 1 + len(sequences) * sequence_length]
    )
    assert 0 <= len(stream) - 1 - len(sequences) * sequence_length < sequence_length


def test_the_last_sequence_may_end_with_the_last_token(email_chain: dict[str, Artifact]) -> None:
    tokens = email_chain["tokens"].path
    length = sum(len(shard) for shard in map_shards(tokens, "test"))
    whole = PackedDataset(tokens, "test", length - 1)
    assert len(whole) == 1
    assert len(whole[0]) == length
    assert len(PackedDataset(tokens, "test", 1)) == length - 1  # nothing follows the last token
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"sequence {index} of 1"):
            whole[index]
    with pytest.raises(
        ConfigError, match=rf"data.sequence_length={length} needs at least {length + 1} tokens in the test"
    ):
        PackedDataset(tokens, "test", length)


@given(size=st.integers(1, 3000), epoch=st.integers(0, 2**40), seed=st.integers(0, 2**63))
def test_every_epoch_is_a_permutation(size: int, epoch: int, seed: int) -> None:
    assert np.array_equal(np.sort(sample_order(size, epoch * size, size, seed)), np.arange(size))


@given(size=st.integers(1, 50), cuts=st.lists(st.integers(0, 40), max_size=8), start=st.integers(0, 500))
def test_the_order_does_not_depend_on_slicing(size: int, cuts: list[int], start: int) -> None:
    whole = sample_order(size, start, sum(cuts), 7)
    position, parts = start, [np.empty(0, np.int64)]
    for count in cuts:
        parts.append(sample_order(size, position, count, 7))
        position += count
    assert np.array_equal(np.concatenate(parts), whole)


def test_seed_and_epoch_decide_the_order() -> None:
    orders = [sample_order(1000, epoch * 1000, 1000, seed) for epoch in range(3) for seed in range(3)]
    # Two independent permutations agree in one place on average; 12 is beyond one in a billion.
    for index, one in enumerate(orders):
        for other in [*orders[:index], np.arange(1000)]:
            assert np.count_nonzero(one == other) < 12


def test_the_order_is_the_same_on_every_machine() -> None:
    """A change here breaks the resumption of every run that is under way."""
    assert sample_order(10, 0, 20, 1234).tolist() == [0, 4, 9, 3, 6, 2, 1, 5, 8, 7, 7, 0, 2, 3, 5, 1, 8, 4, 9, 6]


@pytest.mark.parametrize("size", [2, 3, 5, 17])
def test_every_sequence_is_equally_likely_to_come_first(size: int) -> None:
    draws = 100 * size
    counts = Counter(int(sample_order(size, epoch * size, 1, 3)[0]) for epoch in range(draws))
    chi_square = sum((counts[value] - 100) ** 2 / 100 for value in range(size))
    # Mean size - 1, variance 2 (size - 1): six standard deviations.
    assert chi_square < size - 1 + 6 * (2 * (size - 1)) ** 0.5


def test_neighbours_are_torn_apart() -> None:
    order = sample_order(100_000, 0, 100_000, 0)
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 6 / 100_000**0.5


def test_a_slice_of_a_huge_epoch_is_cheap() -> None:
    size = 10**15  # its permutation would fill 8 petabytes
    order = sample_order(size, 5 * size - 10, 20, 0)
    assert len(set(order.tolist())) == 20
    assert ((order >= 0) & (order < size)).all()


def test_documents_of_a_sequence_are_told_apart_by_what_closes_them(email_chain: dict[str, Artifact]) -> None:
    tokens = email_chain["tokens"].path
    masked, plain = (PackedDataset(tokens, "train", 61, document_masks=masks) for masks in (True, False))
    boundaries = np.cumsum(np.concatenate([shard_documents(tokens, shard) for shard in range(3)]))[:20]
    seen = []
    for index in range(len(masked)):
        row, sequence = masked.row(index), masked[index]
        assert np.array_equal(row.input_ids_L, sequence[:-1])
        assert np.array_equal(plain.row(index).targets_L, sequence[1:])
        assert not plain.row(index).document_ids_L.any()
        closes = np.flatnonzero(sequence[:-1] == 0)
        assert np.array_equal(np.flatnonzero(row.targets_L == IGNORED), closes)
        assert np.array_equal(np.delete(row.targets_L, closes), np.delete(sequence[1:], closes))
        assert np.array_equal(np.flatnonzero(np.diff(row.document_ids_L)), closes[closes < 60])
        seen += (index * 61 + closes + 1).tolist()
    assert seen[: len(boundaries)] == boundaries.tolist()


def shard_documents(tokens: Path, number: int) -> np.ndarray:
    """Tokens of each document of a shard of the train split."""
    shard = json.loads((tokens / "index.json").read_text())["splits"]["train"]["shards"][number]
    starts = np.load(tokens / shard["file"].replace(".bin", ".documents.npy"))
    return np.diff(np.append(starts, shard["tokens"]))


def test_visiting_in_shuffled_order_holds_no_shard_in_memory(tmp_path: Path) -> None:
    """A gigabyte of ids in four shards, read here and there: what is held is a few sequences, not a shard."""
    shards = []
    for number in range(4):
        with (tmp_path / f"train-{number:05d}.bin").open("wb") as file:
            file.truncate(2**28)  # sparse: takes no space
        shards.append({"file": f"train-{number:05d}.bin", "tokens": 2**27, "documents": 1})
    index = {"dtype": "uint16", "vocab_size": 4, "eos_token_id": 0, "splits": {"train": {"shards": shards}}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    dataset = PackedDataset(tmp_path, "train", 1024)
    tracemalloc.start()
    order = dataset.order(10**9, 400, seed=0)  # far into the stream
    assert np.unique(order // (len(dataset) // 4)).tolist() == [0, 1, 2, 3]  # every batch reads from every shard
    assert all(len(dataset[int(i)]) == 1025 for i in order)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
