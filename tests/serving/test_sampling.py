from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flows.export.shipped.sampling import Sampling, choose_token, cut_at_stop, settled

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))


def draw(count: int = 4_000, **options: Any) -> np.ndarray:
    random = np.random.default_rng(0)
    tokens = [choose_token(LOGITS, Sampling(**{"temperature": 1.0} | options), [], random) for _ in range(count)]
    return np.bincount(tokens, minlength=4) / count


def test_zero_temperature_takes_the_best() -> None:
    assert choose_token(LOGITS, Sampling(), [], np.random.default_rng(0)) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ],
)
def test_draws_have_the_asked_distribution(options: dict[str, float], expected: list[float]) -> None:
    # five standard deviations of the frequency of a token among 4,000 draws
    assert draw(**options) == pytest.approx(expected, abs=5 * (0.25 / 4_000) ** 0.5)
    assert ((draw(**options) == 0) == (np.array(expected) == 0)).all()


def test_tokens_that_are_there_already_are_penalized() -> None:
    scores = np.array([2.0, 1.9, -1.0, -1.1], dtype=np.float32)
    random = np.random.default_rng(0)
    assert choose_token(scores, Sampling(repetition_penalty=1.2), [0, 0], random) == 1
    assert choose_token(scores, Sampling(repetition_penalty=1.2), [0, 1], random) == 0
    assert choose_token(scores[2:], Sampling(repetition_penalty=1.2), [0], random) == 1
    assert scores.tolist() == np.array([2.0, 1.9, -1.0, -1.1], dtype=np.float32).tolist()


def test_text_ends_before_the_first_stop_string() -> None:
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one two three", ["four"]) is None


@pytest.mark.parametrize(
    ("text", "stops", "stays"),
    [
        ("one", [], "one"),
        ("one\ufffd", [], "one"),
        ("one t", ["two"], "one "),
        ("one tw", ["two", "ones"], "one "),
        ("one two", ["wow"], "one t"),
        ("aab", ["aabaac"], ""),
        ("one", ["xyz"], "one"),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str], stays: str) -> None:
    assert text[: settled(text, stops)] == stays
