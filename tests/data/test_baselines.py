from __future__ import annotations

import json
import lzma
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flows.artifact import Artifact
from flows.config import ConfigError
from flows.config.data import CorpusConfig, Source
from flows.data import baselines
from flows.data.packed import map_shards
from flows.data.splits import read_documents_of


def test_against_plain_python_and_plain_xz(email_chain: dict[str, Artifact], tmp_path: Path) -> None:
    metrics = baselines.build(tmp_path, None, email_chain)
    assert json.loads((tmp_path / "baselines.json").read_text()) == metrics
    train, test = (
        np.concatenate(map_shards(email_chain["tokens"].path, split)).tolist() for split in ("train", "test")
    )
    counts = Counter(train)
    bits = -sum(math.log2((counts[token] + 1) / (len(train) + 1024)) for token in test)
    text = "".join(text for _, text in read_documents_of(email_chain["corpus"].path, "test")).encode()
    assert metrics["test_tokens"] == len(test)
    assert metrics["test_bytes"] == metrics["xz_bytes_read"] == len(text)
    # Sums of n doubles in different order differ by at most n units in the last place.
    assert metrics["unigram_bits_per_byte"] == pytest.approx(bits / len(text), rel=len(test) * 2**-52)
    assert metrics["xz_bits_per_byte"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text), rel=1e-12)
    assert metrics["xz_bits_per_byte"] < metrics["unigram_bits_per_byte"] < 8


def test_xz_reads_a_bounded_part(
    email_chain: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "XZ_LIMIT_BYTES", 5000)
    metrics = baselines.build(tmp_path, None, email_chain)
    assert metrics["xz_bytes_read"] == 5000 < metrics["test_bytes"]


def test_tokens_are_counted_in_chunks_to_the_last(
    email_chain: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "CHUNK_TOKENS", 1000)
    tokens = email_chain["tokens"].path
    stream = np.concatenate(map_shards(tokens, "train"))
    assert np.array_equal(baselines.token_counts(tokens, "train"), np.bincount(stream, minlength=1024))


def test_no_test_split_is_an_error(
    chain: Callable[..., dict[str, Artifact]], write_json_lines: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_json_lines([{"text": "one"}, {"text": "two"}])
    made = chain(CorpusConfig(source=Source.files, paths=(str(path),), test_fraction=0))
    with pytest.raises(ConfigError, match=r"data.corpus.test_fraction=0 leaves no text to measure on"):
        baselines.build(tmp_path, None, made)
