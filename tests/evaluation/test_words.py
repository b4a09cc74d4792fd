"""Words are counted as a person would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flows.data.packed import IGNORED
from flows.evaluation.words import WordMarks

PIECES = ["<end>", "foo", "Ġbar", "(", "Ċ", "ĠĠ", "baz"]
END, FOO, BAR, OPEN, NEWLINE, SPACES, BAZ = range(7)


@pytest.fixture
def marks(tmp_path: Path) -> WordMarks:
    tokenizer = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(PIECES)}, "<end>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return WordMarks.of(tmp_path, np.array([0, 3, 4, 1, 1, 2, 3, 0]))  # one row more than tokens


def test_marks_follow_the_spelling(marks: WordMarks) -> None:
    assert marks.begins.tolist() == [True, False, True, False, True, True, False, True]
    assert marks.visible.tolist() == [False, True, True, True, False, False, True, False]


def count(marks: WordMarks, targets: list[list[int]], wrong: list[tuple[int, int]]) -> list[int]:
    right = np.ones((len(targets), len(targets[0])), bool)
    for place in wrong:
        right[place] = False
    return marks.count(np.array(targets), right).tolist()


def test_a_word_needs_all_of_its_tokens(marks: WordMarks) -> None:
    row = [FOO, BAR, OPEN, BAZ, BAR, NEWLINE, FOO, SPACES, BAR, OPEN]
    # cut off at the left: foo; whole: " bar(baz", " bar", "\\nfoo"; spaces alone; cut off at the right: " bar("
    assert count(marks, [row], []) == [3, 3]
    assert count(marks, [row], [(0, 3)]) == [3, 2]
    assert count(marks, [row], [(0, 1), (0, 2), (0, 6)]) == [3, 1]
    assert count(marks, [row], [(0, 0), (0, 7), (0, 9)]) == [3, 3], "what is cut off or blank does not count"


def test_rows_are_apart(marks: WordMarks) -> None:
    row = [BAR, BAR, BAR, OPEN]
    assert count(marks, [row, row], [(1, 0)]) == [4, 3]


def test_no_word_goes_across_what_is_not_predicted(marks: WordMarks) -> None:
    assert count(marks, [[BAR, FOO, IGNORED, FOO, BAR, BAR]], []) == [2, 2]
    assert count(marks, [[BAR, FOO, END, FOO, BAR, BAR]], []) == [3, 3]
    assert count(marks, [[IGNORED] * 4], []) == [0, 0]
    assert count(marks, [[FOO, BAZ, FOO]], []) == [0, 0], "no word ends in it"
