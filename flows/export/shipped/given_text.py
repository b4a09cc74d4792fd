"""What a model says of texts as they are: log-probabilities of their tokens, where these stand, and an embedding.

Shape letters: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_ALTERNATIVES = 20
"""Likeliest tokens that may be asked for at each place; as many as in OpenAI's interface."""


@dataclass
class Likelihoods:
    """Log-probabilities of tokens that follow each other, as the scores themselves have it, whatever the sampling."""

    alternatives: int = 0
    """How many of the likeliest tokens are kept for each place."""
    log_probabilities: list[float] = field(default_factory=list)
    """Natural logarithms."""
    top_ids: list[list[int]] = field(default_factory=list)
    """For each place the likeliest tokens, the likeliest first; of equals, the lower id."""
    top_log_probabilities: list[list[float]] = field(default_factory=list)

    def add(self, logits_V: npt.NDArray[Any], token: int) -> None:
        """Notes the token that follows, given the scores of what could."""
        scores = logits_V.astype(np.float64)
        highest = scores.max()
        scores -= highest + np.log(np.exp(scores - highest).sum())
        self.log_probabilities.append(float(scores[token]))
        if self.alternatives:
            top = np.argpartition(-scores, min(self.alternatives, len(scores) - 1))[: self.alternatives]
            top = top[np.lexsort((top, -scores[top]))]
            self.top_ids.append(top.tolist())
            self.top_log_probabilities.append(scores[top].tolist())


class Pool:
    """One vector of length 1 for a text, of the hidden states of its tokens.

    Args:
        pooling: `mean` of all tokens, or the `last` one's.
    """

    def __init__(self, pooling: str) -> None:
        self._pooling = pooling
        self._sum: Any = 0.0

    def add(self, states_ND: npt.NDArray[np.float32]) -> None:
        """Takes in the next tokens of the text, and no padding."""
        if self._pooling == "last":
            self._sum = states_ND[-1].astype(np.float64)
        else:  # their sum points where their mean does
            self._sum = self._sum + states_ND.sum(0, dtype=np.float64)

    def embedding(self) -> npt.NDArray[np.float32]:
        """The vector [D]; zeros only if the states are."""
        length = np.linalg.norm(self._sum) or 1.0
        return np.asarray(self._sum / length, dtype=np.float32)


def token_places(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[int]:
    """Where each token begins in the text that all of them make, in characters.

    A character whose bytes are spread over tokens belongs to the last of them. Few tokens are decoded at a time, always
    together with those before them, because some tokenizers write a token in another way where a text begins.
    """
    places, written = [], 0
    first = shown = 0
    for number in range(len(ids)):
        places.append(written)
        before, with_it = decode(list(ids[first:shown])), decode(list(ids[first : number + 1]))
        is_whole = not with_it.endswith("\ufffd") or number + 1 - shown >= MOST_TOKENS_OF_A_CHARACTER
        if is_whole:
            written += len(with_it) - len(before)
            first, shown = shown, number + 1
    return places


MOST_TOKENS_OF_A_CHARACTER = 4
"""Bytes of a character in UTF-8: whoever has not become one by then never does."""
