"""Stage `baselines`: what the test split costs without a neural model, as bits per byte."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.artifact import Artifact, write_json_atomically
from flows.config.checks import require
from flows.data.encode import INDEX
from flows.data.splits import read_documents_of

XZ_LIMIT_BYTES = 8 * 2**20
CHUNK_TOKENS = 2**22


def build(directory: Path, config: None, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes and returns the bits per byte of a unigram model of the tokens and of `xz -9`, on the test split.

    Args:
        directory: Gets `baselines.json`.
        config: There is nothing to choose.
        parents: `tokens` and `corpus`.

    Raises:
        ConfigError: There is no test split.
    """
    tokens = parents["tokens"].path
    index = json.loads((tokens / INDEX).read_text())
    test = index["splits"]["test"]
    require(test["tokens"] > 0, "data.corpus.test_fraction", 0, "leaves no text to measure on", "Set it to 0.03.")
    text = first_bytes(parents["corpus"].path, "test", XZ_LIMIT_BYTES)
    metrics = {
        "unigram_bits_per_byte": unigram_bits(token_counts(tokens, "train"), token_counts(tokens, "test"))
        / test["bytes"],
        "xz_bits_per_byte": xz_bits(text) / len(text),
        "xz_bytes_read": len(text),
        "test_tokens": test["tokens"],
        "test_bytes": test["bytes"],
    }
    write_json_atomically(directory / "baselines.json", metrics)
    return metrics


def token_counts(directory: Path, split: str) -> NDArray[np.int64]:
    """How often each token occurs in a split of a tokens artifact, end-of-text included: int64 [vocab]."""
    index = json.loads((directory / INDEX).read_text())
    counts = np.zeros(index["vocab_size"], np.int64)
    for shard in index["splits"][split]["shards"]:
        with (directory / shard["file"]).open("rb") as file:
            while len(ids := np.fromfile(file, index["dtype"], CHUNK_TOKENS)):
                counts += np.bincount(ids, minlength=len(counts))
    return counts


def unigram_bits(train_counts: NDArray[np.int64], test_counts: NDArray[np.int64]) -> float:
    """Bits that the test tokens cost under add-one smoothed frequencies of the train tokens."""
    probabilities = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return float(-(test_counts * np.log2(probabilities)).sum())


def xz_bits(text: bytes) -> int:
    """Bits of the text as `xz -9` writes it.

    Its dictionary of 64 MiB never needs to exceed the text; the smaller one here saves half a gigabyte of memory.
    """
    compressed = lzma.compress(
        text, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": XZ_LIMIT_BYTES}], check=lzma.CHECK_CRC64
    )
    return 8 * len(compressed)


def first_bytes(directory: Path, split: str, limit_bytes: int) -> bytes:
    """The text of a split's first documents, end to end, cut at `limit_bytes`."""
    text = bytearray()
    for _, document in read_documents_of(directory, split):
        text += document.encode()
        if len(text) >= limit_bytes:
            break
    return bytes(text[:limit_bytes])
