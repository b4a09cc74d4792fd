from __future__ import annotations

import numpy as np
import pytest

from flows.serving.models.sampling import choose_token, cut_at_stop

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))


def draw(count: int = 4_000, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(0)
    tokens = [choose_token(LOGITS, temperature, top_k, top_p, random) for _ in range(count)]
    return np.bincount(tokens, minlength=4) / count


def test_zero_temperature_takes_the_best() -> None:
    assert choose_token(LOGITS, 0, 0, 1.0, np.random.default_rng(0)) == 1


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
    assert draw(**options) == pytest.approx(expected, abs=5 * (0.25 / 4_000) ** 0.5)  # type: ignore[arg-type]
    assert ((draw(**options) == 0) == (np.array(expected) == 0)).all()  # type: ignore[arg-type]


def test_text_ends_before_the_first_stop_string() -> None:
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one two three", ["four"]) is None
