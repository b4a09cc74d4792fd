"""Hidden tokens: how many, which ones, what stands in their place, and that nothing but sample and step decides it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flows.config.model import Family
from flows.data.masking import MaskedSequences, Vocabulary, view_of
from flows.data.packed import IGNORED, PackedDataset

VOCAB_SIZE, MASK, END, LENGTH = 1000, 3, 2, 64
IS_TEXT = np.arange(VOCAB_SIZE) >= 5
WORDS = Vocabulary(MASK, IS_TEXT)


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    tokens = np.random.default_rng(0).integers(5, VOCAB_SIZE, 200 * LENGTH + 1)
    tokens[::50] = END
    tokens.astype("<u2").tofile(tmp_path / "train.bin")
    shards = {"train": {"shards": [{"file": "train.bin", "tokens": len(tokens)}]}}
    (tmp_path / "index.json").write_text(json.dumps({"dtype": "uint16", "eos_token_id": END, "splits": shards}))
    return PackedDataset(tmp_path, "train", LENGTH, document_masks=True)


def inputs(sequences: MaskedSequences) -> NDArray[np.int64]:
    return np.stack([sequences.row(index).input_ids_L for index in range(len(sequences))])


def test_a_share_of_the_text_is_hidden_in_three_ways(dataset: PackedDataset) -> None:
    hidden_by_way, hidden_of_words = np.zeros(3, np.int64), set()
    for index in range(len(dataset)):
        plain, row = dataset.row(index), MaskedSequences(dataset, 0.15, (7, 0), vocabulary=WORDS).row(index)
        hidden = row.targets_L != IGNORED
        text = IS_TEXT[plain.input_ids_L]
        assert not (hidden & ~text).any()
        assert hidden.sum() == round(0.15 * text.sum())
        assert (row.targets_L[hidden] == plain.input_ids_L[hidden]).all()
        assert (row.input_ids_L[~hidden] == plain.input_ids_L[~hidden]).all()
        assert (row.document_ids_L == plain.document_ids_L).all()
        shown, was = row.input_ids_L[hidden], plain.input_ids_L[hidden]
        assert (IS_TEXT[shown] | (shown == MASK)).all()
        hidden_by_way += [(shown == MASK).sum(), ((shown != MASK) & (shown != was)).sum(), (shown == was).sum()]
        hidden_of_words |= set(np.flatnonzero(hidden).tolist())
    count = hidden_by_way.sum()
    expected = np.array([0.8, 0.1 * (1 - 1 / IS_TEXT.sum()), 0.1 + 0.1 / IS_TEXT.sum()])
    # four standard deviations of a share of independent draws
    assert (np.abs(hidden_by_way / count - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)).all()
    assert hidden_of_words == set(range(LENGTH)), "every position has its turn"


def test_masks_follow_from_sample_and_step_alone(dataset: PackedDataset) -> None:
    first = inputs(MaskedSequences(dataset, 0.15, (7, 0), vocabulary=WORDS))
    assert (first == inputs(MaskedSequences(dataset, 0.15, (7, 0), vocabulary=WORDS))[::1]).all()
    for other in ((7, 1), (8, 0)):
        assert (first != inputs(MaskedSequences(dataset, 0.15, other, vocabulary=WORDS))).any(axis=1).all()
    evaluated = MaskedSequences(dataset, vocabulary=WORDS)
    assert (inputs(evaluated) == inputs(MaskedSequences(dataset, vocabulary=WORDS))).all()
    more = MaskedSequences(dataset, 0.5, vocabulary=WORDS)
    assert (more.row(0).targets_L != IGNORED).sum() == round(0.5 * IS_TEXT[dataset.row(0).input_ids_L].sum())
    assert len(evaluated) == len(dataset)
    assert (evaluated[3] == dataset[3]).all()
    assert (evaluated.order(5, 9, 1) == dataset.order(5, 9, 1)).all()
    assert (evaluated.first(4) == dataset.first(4)).all()


def test_little_text_has_one_token_hidden_and_none_has_none(dataset: PackedDataset) -> None:
    rare = np.zeros(VOCAB_SIZE, np.bool_)
    rare[dataset.row(0).input_ids_L[1]] = True
    assert (MaskedSequences(dataset, vocabulary=Vocabulary(MASK, rare)).row(0).targets_L != IGNORED).sum() == 1
    nothing = MaskedSequences(dataset, vocabulary=Vocabulary(MASK, np.zeros(VOCAB_SIZE, np.bool_))).row(0)
    assert (nothing.targets_L == IGNORED).all()
    assert (nothing.input_ids_L == dataset.row(0).input_ids_L).all()


def test_a_causal_model_is_shown_the_split_as_it_is(dataset: PackedDataset, tmp_path: Path) -> None:
    assert view_of(Family.causal_lm, tmp_path)(dataset, 0.5, (1, 2)) is dataset
    np.save(tmp_path / "token_bytes.npy", IS_TEXT.astype(np.int64))
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": {"content": "[MASK]"}}')
    vocabulary = {f"word{number}": number for number in range(5, VOCAB_SIZE)} | {"[MASK]": MASK}
    described = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word5"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", **described}))
    shown = view_of(Family.masked_lm, tmp_path)(dataset, 0.15, (7, 0))
    assert isinstance(shown, MaskedSequences)
    assert (inputs(shown) == inputs(MaskedSequences(dataset, 0.15, (7, 0), vocabulary=WORDS))).all()
