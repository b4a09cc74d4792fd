"""Chooses the next token from scores. Shape letter: V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are chosen."""

    temperature: float = 0.0
    """Divides the scores; 0 = the highest score, the first one of equals."""
    top_k: int = 0
    """Draws from this many highest scores only; 0 = all."""
    top_p: float = 1.0
    """Then from the fewest of these whose probabilities reach this sum (nucleus sampling, arXiv:1904.09751)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative scores of tokens that the text has already (arXiv:1909.05858)."""


def choose_token(
    logits_V: npt.NDArray[Any], sampling: Sampling, ids: Sequence[int], random: np.random.Generator
) -> int:
    """Id of the next token.

    Args:
        logits_V: Scores.
        sampling: How it is chosen.
        ids: Tokens of the text so far.
        random: Takes one number from it per call, unless `sampling.temperature` is 0.
    """
    if sampling.repetition_penalty != 1:
        seen = np.unique(np.asarray(ids, np.int64))
        logits_V = logits_V.copy()
        penalized = logits_V[seen]
        logits_V[seen] = np.where(
            penalized > 0, penalized / sampling.repetition_penalty, penalized * sampling.repetition_penalty
        )
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    order = np.argsort(-logits_V, kind="stable")[: sampling.top_k or None]
    scaled = logits_V[order].astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled[0])
    cumulative = weights.cumsum() / weights.sum()
    kept = int(np.searchsorted(cumulative, sampling.top_p)) + 1
    cumulative = cumulative[:kept]
    drawn = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
    return int(order[min(drawn, len(cumulative) - 1)])


def cut_at_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first stop string in it; None if there is none."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else None


def settled(text: str, stops: Sequence[str]) -> int:
    """How many characters of a growing text are sure to stay.

    What may become a stop string is not, nor a character whose bytes are not all there yet (U+FFFD).
    """
    sure = len(text.rstrip("\ufffd"))
    for stop in stops:
        for held in range(min(len(stop) - 1, sure), 0, -1):
            if text[:sure].endswith(stop[:held]):
                sure -= held
                break
    return sure
