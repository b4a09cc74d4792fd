# Shape letters are upper case.
"""Sequences with some of their tokens hidden, which a model learns to fill in (BERT, arXiv:1810.04805).

Shape letters: L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flows.config.model import Family
from flows.data.packed import IGNORED, Row, Sequences
from flows.data.tokenizer import mask_token_id

EVALUATED_SHARE = 0.15
"""Of the tokens that count, hidden in every evaluation, whatever training hides: losses can be compared then."""
EVALUATED = (0,)
"""What masks of evaluations are drawn from besides the sample's index."""
MASKED, REPLACED = 0.8, 0.1
"""Shares of the hidden tokens that become the mask token, and any other token; the rest stays as it is."""


class View(Protocol):
    """How a family of models is shown a split."""

    def __call__(
        self, dataset: Sequences, share: float = EVALUATED_SHARE, draw: tuple[int, ...] = EVALUATED
    ) -> Sequences:
        """The split as the family learns it.

        Args:
            dataset: The split as text that goes on.
            share: Of the tokens, hidden.
            draw: Seed and step: others hide other tokens.
        """


def view_of(family: Family, tokenizer_dir: Path) -> View:
    """How a family of models is shown a split; but for masked models it is what it is.

    Args:
        family: The model's.
        tokenizer_dir: The tokenizer's artifact, or a model that carries it.
    """
    if family != Family.masked_lm:
        return _as_it_is
    return partial(MaskedSequences, vocabulary=Vocabulary.read(tokenizer_dir))


def _as_it_is(dataset: Sequences, share: float = EVALUATED_SHARE, draw: tuple[int, ...] = EVALUATED) -> Sequences:
    return dataset


@dataclass(frozen=True)
class Vocabulary:
    """What has to be known of a vocabulary to hide its tokens."""

    mask_token_id: int
    is_text_V: NDArray[np.bool_]
    """Which tokens stand for text: they alone are hidden, and put in the place of others."""

    @classmethod
    def read(cls, tokenizer_dir: Path) -> Vocabulary:
        """The vocabulary of a tokenizer artifact."""
        return cls(mask_token_id(tokenizer_dir), np.load(tokenizer_dir / "token_bytes.npy") > 0)


class MaskedSequences:
    """A split with hidden tokens: `row` gives what is left as inputs, and what was hidden as targets.

    Which tokens are hidden, and how, follows from the sequence's index and `draw` alone: every rank, and every run that
    goes on, hides the same ones. The share is exact, to half a token, and at least one token is hidden.

    Args:
        dataset: The split.
        share: Of each sequence's tokens of text, hidden.
        draw: Whole numbers from 0 on; others hide other tokens.
        vocabulary: Of the split.
    """

    def __init__(
        self,
        dataset: Sequences,
        share: float = EVALUATED_SHARE,
        draw: tuple[int, ...] = EVALUATED,
        *,
        vocabulary: Vocabulary,
    ) -> None:
        self._dataset, self._share, self._draw, self._vocabulary = dataset, share, draw, vocabulary
        self._words = np.flatnonzero(vocabulary.is_text_V)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Tokens of sequence `index` as they are, int64 [L + 1]."""
        return self._dataset[index]

    def row(self, index: int) -> Row:
        """Sequence `index` with tokens hidden, its targets those tokens, and its documents."""
        row = self._dataset.row(index)
        tokens_L = row.input_ids_L
        targets_L, inputs_L = np.full_like(tokens_L, IGNORED), tokens_L.copy()
        text = np.flatnonzero(self._vocabulary.is_text_V[tokens_L])
        if len(text):
            random = np.random.default_rng([*self._draw, index])
            hidden = random.choice(text, max(1, round(self._share * len(text))), replace=False)
            kind = random.random(len(hidden))
            masked, replaced = hidden[kind < MASKED], hidden[(kind >= MASKED) & (kind < MASKED + REPLACED)]
            targets_L[hidden] = tokens_L[hidden]
            inputs_L[masked] = self._vocabulary.mask_token_id
            inputs_L[replaced] = random.choice(self._words, len(replaced))
        return Row(inputs_L, targets_L, row.document_ids_L)

    def order(self, start: int, count: int, seed: int) -> NDArray[np.int64]:
        """Indices at positions `start` to `start + count` of an endless shuffled stream, int64 [count]."""
        return self._dataset.order(start, count, seed)

    def first(self, count: int) -> NDArray[np.int64]:
        """Indices of at most `count` sequences to evaluate on: none twice, the same ones each time."""
        return self._dataset.first(count)
