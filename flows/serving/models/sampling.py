"""Chooses the next token from scores. Shape letter: V vocabulary."""

from typing import Any

import numpy as np
import numpy.typing as npt


def choose_token(
    logits_V: npt.NDArray[Any], temperature: float, top_k: int, top_p: float, random: np.random.Generator
) -> int:
    """Id of the next token.

    Args:
        logits_V: Scores.
        temperature: Divides the scores; 0 = the highest score, the first one of equals.
        top_k: Draws from this many highest scores only; 0 = all.
        top_p: Then from the fewest of these whose probabilities reach this sum (nucleus sampling, arXiv:1904.09751).
        random: Takes one number from it per call, unless `temperature` is 0.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    order = np.argsort(-logits_V, kind="stable")[: top_k or None]
    scaled = logits_V[order].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled[0])
    cumulative = weights.cumsum() / weights.sum()
    kept = int(np.searchsorted(cumulative, top_p)) + 1
    cumulative = cumulative[:kept]
    drawn = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
    return int(order[min(drawn, len(cumulative) - 1)])


def cut_at_stop(text: str, stops: list[str]) -> str | None:
    """The text before the first stop string in it; None if there is none."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else None
