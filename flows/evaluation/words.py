"""Whole words that a model continues with: the task that any text brings along."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.data.packed import IGNORED
from flows.data.tokenizer import load_tokenizer

WHITE_SPACE = frozenset("ĠĊčĉ")
"""How byte-level tokens spell space, line feed, carriage return and tab."""


@dataclass(frozen=True)
class WordMarks:
    """What each token is to the word that it stands in."""

    begins: NDArray[np.bool_]
    """Tokens that begin with white space, and special ones, which no word goes across [V]."""
    visible: NDArray[np.bool_]
    """Tokens that hold more than white space [V]."""

    @classmethod
    def of(cls, tokenizer_dir: Path, token_bytes: NDArray[Any]) -> WordMarks:
        """The marks of a tokenizer artifact's tokens; `token_bytes` [V] is 0 for special ones."""
        begins, visible = token_bytes == 0, np.zeros(len(token_bytes), bool)
        for token, index in load_tokenizer(tokenizer_dir).get_vocab().items():
            if token_bytes[index]:
                begins[index] = token[0] in WHITE_SPACE
                visible[index] = not WHITE_SPACE.issuperset(token)
        return cls(begins, visible)

    def count(self, targets: NDArray[np.int64], right: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Words in the rows and those of which every token is right [2]; what a row cuts off is left out.

        Args:
            targets: Tokens to predict, `IGNORED` where none is [B, L].
            right: Where the model's first choice is that token [B, L].
        """
        known = targets != IGNORED
        begins = ~known | self.begins[targets.clip(0)]
        word = begins.cumsum(1)  # 0: what the row before has begun
        word = np.where((word == 0) | (word == word[:, -1:]), 0, word)
        number = (word + np.arange(len(word))[:, None] * (targets.shape[1] + 1)).ravel()

        def words_with(tokens: NDArray[np.bool_]) -> NDArray[np.bool_]:
            return np.bincount(number, tokens.ravel(), number.max() + 1) > 0

        whole = words_with(self.visible[targets.clip(0)] & (word > 0)) & ~words_with(~known)
        return np.array([whole.sum(), (whole & ~words_with(~right)).sum()])
