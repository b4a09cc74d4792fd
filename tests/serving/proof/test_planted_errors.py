"""What the proof would have caught: every planted error, by name of the check that saw it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flows.serving.proof.planted_errors import Planted, lines, plant_errors
from flows.serving.proof.reverify import check_files, read_proven
from tests.serving.tiny_chain import NAME, PASSPORT, Published

pytestmark = pytest.mark.server
CAUGHT_BY = {
    "none": set(),
    "one flipped weight byte": {"scores"},
    "wrong epsilon": {"scores"},
    "wrong rope theta": {"scores"},
    "a dropped layer": {"scores"},
    "a swapped input": {"scores"},
    "wrong padding side": {"scores"},
    "padding that is not masked": {"scores"},
    "another tokenizer": {"tokenizer"},
    "a key and value cache off by one": {"greedy text"},
    "pooling that counts padding": {"embeddings"},
    "a given text scored one token late": {"given text"},
    "a version file replaced after publishing": {"loads"},
    "a config.pbtxt that disagrees": {"config"},
}


@pytest.fixture(scope="module")
def planted(published: Published) -> dict[str, Planted]:
    proven = read_proven(published.repository, NAME, 1, published.store)
    fewer = replace(PASSPORT.verify, lengths=(5,), real_inputs=2, text_prompts=2)
    rows = plant_errors(proven, replace(proven, config=replace(proven.config, verify=fewer)).expect())
    print("\n".join(lines(rows)))
    return {row.error: row for row in rows}


def test_the_list_is_whole(planted: dict[str, Planted]) -> None:
    assert planted.keys() == CAUGHT_BY.keys()


@pytest.mark.parametrize("error", CAUGHT_BY)
def test_a_planted_error_is_caught_by_name(planted: dict[str, Planted], error: str) -> None:
    assert set(planted[error].caught_by) >= CAUGHT_BY[error]
    if error == "none":
        assert planted[error].caught_by == []


def test_the_published_version_is_left_as_it_was(planted: dict[str, Planted], published: Published) -> None:
    proven = read_proven(published.repository, NAME, 1, published.store)
    assert all(check.passed for check in check_files(proven))
