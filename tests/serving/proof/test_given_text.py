"""What is said of texts as they are: log-probabilities, places of tokens, embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from flows.data.tokenizer import load_tokenizer
from flows.export.shipped.given_text import Likelihoods, Pool, token_places
from tests.serving.tiny_chain import Chain

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))


def test_log_probabilities_are_of_the_scores_themselves() -> None:
    found = Likelihoods()
    found.add(LOGITS + 7, 2)
    found.add(np.array([1e4, 0.0], np.float32), 1)
    assert found.log_probabilities == pytest.approx([np.log(0.2), -1e4])
    assert (found.top_ids, found.top_log_probabilities) == ([], [])


def test_the_likeliest_come_first_and_of_equals_the_lower_id() -> None:
    found = Likelihoods(alternatives=3)
    found.add(LOGITS, 0)
    found.add(np.zeros(3, np.float32), 2)
    assert found.top_ids == [[1, 3, 2], [0, 1, 2]]
    assert found.top_log_probabilities[0] == pytest.approx(np.log([0.4, 0.3, 0.2]))
    assert found.log_probabilities[1] == found.top_log_probabilities[1][0], "equal scores, equal numbers"


@pytest.mark.parametrize(("pooling", "expected"), [("mean", [0.6, 0.8]), ("last", [0.0, 1.0])])
def test_a_text_in_parts_has_the_embedding_of_the_whole(pooling: str, expected: list[float]) -> None:
    states = np.array([[1, 0], [2, 0], [0, 4]], np.float32)
    for cut in (1, 2):
        pool = Pool(pooling)
        for part in (states[:cut], states[cut:]):
            pool.add(part)
        assert pool.embedding() == pytest.approx(expected)
        assert pool.embedding().dtype == np.float32


@pytest.mark.parametrize(
    "text", ["", "def value", "äußern \U0001f600 x", "\U0001f469\u200d\U0001f680e\u0301", "\n\n\x00"]
)
def test_tokens_stand_where_their_text_is(chain: Chain, text: str) -> None:
    tokenizer = load_tokenizer(chain.tokenizer.path)
    ids = tokenizer.encode(text).ids
    places = token_places(tokenizer.decode, ids)
    ends = [*places[1:], len(text)]
    assert "".join(text[place:end] for place, end in zip(places, ends, strict=False)) == text
    for token, place, end in zip(ids, places, ends, strict=False):
        spelled = tokenizer.decode([token])
        assert text[place:end] == spelled or "\ufffd" in spelled


def test_bytes_that_never_become_a_character_do_not_hold_up_the_rest(chain: Chain) -> None:
    tokenizer = load_tokenizer(chain.tokenizer.path)
    ids = tokenizer.encode("\U0001f600").ids[:1] * 6 + tokenizer.encode("def").ids
    places = token_places(tokenizer.decode, ids)
    assert places == sorted(places)
    assert 0 < places[-1] <= len(tokenizer.decode(ids))


def test_a_tokenizer_that_drops_the_first_space_is_read_alike() -> None:
    tokenizer = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581bc": 1, "d": 2}, unk_token="d"))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([0, 1, 2, 0]) == "a bcd a"
    assert token_places(tokenizer.decode, [0, 1, 2, 0]) == [0, 1, 4, 5]
