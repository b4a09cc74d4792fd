"""Stage `baselines`: what the test split costs without a neural model, as bits per byte."""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.artifact import Artifact, write_json_atomically
from flows.config.checks import require
from flows.config.data import MAIN, corpus_role
from flows.data.encode import corpus_dir
from flows.data.labelled_documents import read_labels
from flows.data.macro_f1 import macro_f1
from flows.data.packed import map_shards, read_index
from flows.data.splits import read_documents_of
from flows.data.whole_documents import map_loss_masks

XZ_LIMIT_BYTES = 8 * 2**20
CHUNK_TOKENS = 2**22


def build(directory: Path, config: Mapping[str, int] | None, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes and returns the bits per byte of a unigram model of the tokens and of `xz -9`, on the test split.

    Of texts with labels it is what `label_baselines` returns.

    Args:
        directory: Gets `baselines.json`.
        config: Weights of the corpora of a mixture, by name; both baselines read them in these shares of tokens.
        parents: `tokens`, `tokenizer` and the corpora.

    Raises:
        ConfigError: There is no test split.
    """
    if "labels" in read_index(parents["tokens"].path):
        metrics = label_baselines(parents["tokens"].path)
        write_json_atomically(directory / "baselines.json", metrics)
        return metrics
    weights = config or {MAIN: 1}
    places = {name: corpus_dir(parents["tokens"].path, name) for name in weights}
    counted = {name: token_counts(place, "test") for name, place in places.items()}
    for counts in counted.values():
        require(counts.sum() > 0, "data.corpus.test_fraction", 0, "leaves no text to measure on", "Set it to 0.03.")
    token_bytes = np.load(parents["tokenizer"].path / "token_bytes.npy")
    test = in_shares(counted, weights)
    train = in_shares({name: token_counts(place, "train") for name, place in places.items()}, weights)
    texts = {name: first_bytes(parents[corpus_role(name)].path, "test", XZ_LIMIT_BYTES) for name in weights}
    xz_bits_of = {
        name: float(counts @ token_bytes) * xz_bits(texts[name]) / len(texts[name]) for name, counts in test.items()
    }
    mixed_bytes = float(summed(test) @ token_bytes)
    metrics = {
        "unigram_bits_per_byte": unigram_bits(summed(train), summed(test)) / mixed_bytes,
        "xz_bits_per_byte": sum(xz_bits_of.values()) / mixed_bytes,
        "xz_bytes_read": sum(map(len, texts.values())),
        "test_tokens": sum(int(counts.sum()) for counts in counted.values()),
        "test_bytes": sum(int(counts @ token_bytes) for counts in counted.values()),
    }
    write_json_atomically(directory / "baselines.json", metrics)
    return metrics


def label_baselines(directory: Path) -> dict[str, Any]:
    """How well a guess does on the test split's labels that knows only how frequent each is.

    Args:
        directory: Tokens artifact of texts with labels.

    Returns:
        `majority` (the label that the test split itself has most of), `majority_accuracy` and `majority_macro_f1` of
        always naming it, the best that any constant answer can do, and `frequencies_loss`, the nats per text of naming
        each as often as training saw it.
    """
    names = read_index(directory)["labels"]
    train, test = (np.bincount(read_labels(directory, split), minlength=len(names)) for split in ("train", "test"))
    require(test.sum() > 0, "data.corpus.test_fraction", 0, "leaves no text to measure on", "Set it to 0.03.")
    majority = int(test.argmax())
    always = np.zeros((len(names), len(names)), np.int64)
    always[:, majority] = test
    return {
        "majority": names[majority],
        "majority_accuracy": float(test[majority] / test.sum()),
        "majority_macro_f1": macro_f1(always),
        "frequencies_loss": float(-(test * np.log(train / train.sum())).sum() / test.sum()),
        "test_texts": int(test.sum()),
    }


def in_shares(counts: Mapping[str, NDArray[np.int64]], weights: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
    """Token counts of each corpus, scaled so that their sums are in the shares of the weights and add up as before."""
    everything, turns = sum(int(count.sum()) for count in counts.values()), sum(weights.values())
    return {name: count * (everything * weights[name] / turns / count.sum()) for name, count in counts.items()}


def summed(counts: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Counts of all corpora together."""
    total: NDArray[np.float64] = np.sum(list(counts.values()), axis=0)
    return total


def token_counts(directory: Path, split: str) -> NDArray[np.int64]:
    """How often each token that counts occurs in a split of a tokens artifact, int64 [vocab].

    Of plain text all tokens count, end-of-text included; of conversations the answers.
    """
    index = read_index(directory)
    if index.get("whole_documents"):
        shards = zip(map_shards(directory, split), map_loss_masks(directory, split), strict=True)
        return sum(
            (np.bincount(ids[mask != 0], minlength=index["vocab_size"]) for ids, mask in shards),
            np.zeros(index["vocab_size"], np.int64),
        )
    counts = np.zeros(index["vocab_size"], np.int64)
    for shard in index["splits"][split]["shards"]:
        with (directory / shard["file"]).open("rb") as file:
            while len(ids := np.fromfile(file, index["dtype"], CHUNK_TOKENS)):
                counts += np.bincount(ids, minlength=len(counts))
    return counts


def unigram_bits(train_counts: NDArray[Any], test_counts: NDArray[Any]) -> float:
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
