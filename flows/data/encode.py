"""Stage `tokens`: cleaned text to memory-mapped shards of token ids, each document closed by the end-of-text token."""

from __future__ import annotations

import logging
import os
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from flows.artifact import Artifact, write_json_atomically
from flows.config.checks import require
from flows.config.data import MAIN, EncodeConfig, corpus_name, corpus_role
from flows.data.conversations import encode_conversations
from flows.data.labelled import encode_to_classify, text_and_label
from flows.data.splits import LABELLED, MESSAGES, SPLITS, read_stored, stored_kind
from flows.data.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size

INDEX = "index.json"
EncodeBatch = Callable[[Tokenizer, list[str], int, np.dtype[Any], int], "EncodedBatch"]
"""(tokenizer, texts, their bytes, dtype of the ids, id that closes a text) -> the encoded texts."""
PARALLELISM = "TOKENIZERS_PARALLELISM"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Token ids of several documents."""

    documents: list[NDArray[Any]]
    """Ids of each document, end-of-text token included."""
    text_bytes: int
    loss: list[NDArray[np.uint8]] | None = None
    """For conversations: which ids count, for each document."""
    labels: list[int] | None = None
    """For texts with labels: the number of each document's."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Of conversations `loss_tokens` (those that count), `cut` (documents that were longer than allowed) and
    `unanswered` (left out, because no answer begins within the allowed length); of texts with labels `cut` and
    `unknown` (left out, because training has none with their label)."""


def build(directory: Path, config: EncodeConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes the shards of every split and `index.json`, which describes them.

    `<split>-<number>.bin` holds raw little-endian ids, `<split>-<number>.documents.npy` the int64 offset of each
    document's first token, for conversations `<split>-<number>.loss.bin` a byte for each token: 1 if it counts, and for
    texts with labels `<split>-<number>.labels.npy` the number of each document's, whose names `index.json` lists. No
    document straddles two shards. The further corpora of a mixture lie in directories of their own, of the same form.

    Raises:
        ConfigError: No token of a corpus's training split counts.
    """
    corpora = {role: corpus for role, corpus in parents.items() if role.startswith(corpus_role(MAIN))}
    total_bytes = sum(split["bytes"] for corpus in corpora.values() for split in corpus.metrics["splits"].values())
    started = time.perf_counter()
    sizes: dict[str, dict[str, dict[str, int]]] = {}
    with tqdm(desc="encode", total=total_bytes, unit="B", unit_scale=True, disable=None) as progress:
        for role, corpus in corpora.items():
            name = corpus_name(role)
            place = corpus_dir(directory, name)
            place.mkdir(exist_ok=True)
            sizes[name] = _encode_corpus(place, config, corpus, parents["tokenizer"].path, progress)
    seconds = time.perf_counter() - started
    splits = {
        split: {key: sum(size[split][key] for size in sizes.values()) for key in ("tokens", "documents", "bytes")}
        for split in SPLITS
    }
    return {
        "splits": splits if len(sizes) > 1 else sizes[MAIN],
        "bytes_per_token": total_bytes / sum(entry["tokens"] for entry in splits.values()),
        "megabytes_per_second": total_bytes / 1e6 / seconds,
        **({"corpora": sizes} if len(sizes) > 1 else {}),
    }


def corpus_dir(directory: Path, name: str) -> Path:
    """Where a tokens artifact keeps the corpus of that name."""
    return directory if name == MAIN else directory / name


def _encode_corpus(
    directory: Path, config: EncodeConfig, corpus: Artifact, tokenizer_dir: Path, progress: tqdm[Any]
) -> dict[str, dict[str, int]]:
    """Writes one corpus; what its index says about each split, but for the shards."""
    vocab_size, end = vocabulary_size(tokenizer_dir), end_of_text_id(tokenizer_dir)
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    stored = stored_kind(corpus.path)
    encode: EncodeBatch = _as_texts
    kind: dict[str, Any] = {}
    if stored == MESSAGES:
        kind = {"whole_documents": True}
        encode = partial(_as_conversations, max_tokens=config.max_conversation_tokens)
    if stored == LABELLED:
        kind = {"labels": corpus.metrics["labels"]["names"]}
        assert config.max_conversation_tokens is not None
        encode = partial(_as_labelled, max_tokens=config.max_conversation_tokens, labels=kind["labels"])
    splits = {}
    for split in SPLITS:
        writer = _ShardWriter(directory, split, config.shard_bytes)
        texts = (text for _, text in read_stored(corpus.path, split))
        for batch in encode_batches(tokenizer_dir, texts, config.batch_bytes, dtype, encode):
            writer.write(batch)
            progress.update(batch.text_bytes)
        splits[split] = writer.finish()
    write_json_atomically(
        directory / INDEX,
        {"dtype": dtype.name, "vocab_size": vocab_size, "eos_token_id": end, **kind, "splits": splits},
    )
    if stored == MESSAGES:
        train = splits["train"]
        require(
            train["loss_tokens"] > 0,
            "data.corpus.format",
            "messages",
            f"leaves no token to learn: in {train['unanswered']} conversations no answer begins within the first "
            f"{config.max_conversation_tokens} tokens",
            "Set a longer data.sequence_length, or look at the roles of the messages.",
        )
        if train["cut"] or train["unanswered"]:
            logger.warning(
                "of %s conversations to train on %s are cut at %s tokens, and %s more are left out: no answer begins "
                "before that. data.sequence_length says where it is",
                *(f"{number:,}" for number in (train["documents"] + train["unanswered"], train["cut"])),
                config.max_conversation_tokens,
                f"{train['unanswered']:,}",
            )
    return {
        split: {name: value for name, value in entry.items() if name != "shards"} for split, entry in splits.items()
    }


def _as_texts(tokenizer: Tokenizer, batch: list[str], text_bytes: int, dtype: np.dtype[Any], end: int) -> EncodedBatch:
    encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return EncodedBatch([np.array([*encoding.ids, end], dtype) for encoding in encodings], text_bytes)


def _as_conversations(
    tokenizer: Tokenizer, batch: list[str], text_bytes: int, dtype: np.dtype[Any], end: int, max_tokens: int | None
) -> EncodedBatch:
    encoded = encode_conversations(tokenizer, batch, end, max_tokens, dtype)
    kept = [one for one in encoded if one.loss.any()]
    return EncodedBatch(
        [one.ids for one in kept],
        text_bytes,
        [one.loss for one in kept],
        counts={
            "loss_tokens": sum(int(one.loss.sum()) for one in kept),
            "cut": sum(one.cut for one in kept),
            "unanswered": len(encoded) - len(kept),
        },
    )


def _as_labelled(
    tokenizer: Tokenizer,
    batch: list[str],
    text_bytes: int,
    dtype: np.dtype[Any],
    end: int,
    max_tokens: int,
    labels: list[str],
) -> EncodedBatch:
    known = [(text, label) for text, label in map(text_and_label, batch) if label in labels]
    encoded = encode_to_classify(tokenizer, [text for text, _ in known], end, max_tokens)
    return EncodedBatch(
        [np.array(ids, dtype) for ids, _ in encoded],
        text_bytes,
        labels=[labels.index(label) for _, label in known],
        counts={"cut": sum(cut for _, cut in encoded), "unknown": len(batch) - len(known)},
    )


def encode_batches(
    tokenizer_dir: Path,
    texts: Iterable[str],
    batch_bytes: int,
    dtype: np.dtype[Any],
    encode_batch: EncodeBatch = _as_texts,
) -> Iterator[EncodedBatch]:
    """Yields the texts' token ids in order, while the next batches are read and encoded, one on each core.

    Each thread has a tokenizer of its own: the library's threads share one, and its cache of words behind a lock, which
    takes a third of their speed on two cores.
    """
    own = threading.local()
    end = end_of_text_id(tokenizer_dir)

    def encode(batch: list[str], text_bytes: int) -> EncodedBatch:
        if not hasattr(own, "tokenizer"):
            own.tokenizer = load_tokenizer(tokenizer_dir)
        return encode_batch(own.tokenizer, batch, text_bytes, dtype, end)

    cores = len(os.sched_getaffinity(0))
    with _library_threads_off(), ThreadPoolExecutor(cores) as pool:
        at_work: deque[Future[EncodedBatch]] = deque()
        for batch, size in _batches(texts, batch_bytes):
            at_work.append(pool.submit(encode, batch, size))
            if len(at_work) > cores:  # one waits, so that no core does
                yield at_work.popleft().result()
        while at_work:
            yield at_work.popleft().result()


@contextmanager
def _library_threads_off() -> Iterator[None]:
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


def _batches(texts: Iterable[str], batch_bytes: int) -> Iterator[tuple[list[str], int]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= batch_bytes:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


class _ShardWriter:
    """Appends documents to a split's shards; a shard is closed by the document that takes it to its size."""

    def __init__(self, directory: Path, split: str, shard_bytes: int) -> None:
        self._directory = directory
        self._split = split
        self._shard_bytes = shard_bytes
        self._text_bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._starts = array("q")
        self._tokens = 0
        self._loss: BinaryIO | None = None
        self._labels: list[int] = []
        self._counts: Counter[str] = Counter()

    def write(self, batch: EncodedBatch) -> None:
        self._text_bytes += batch.text_bytes
        self._counts.update(batch.counts)
        masks, labels = batch.loss or repeat(None), batch.labels or repeat(None)
        for ids, mask, label in zip(batch.documents, masks, labels, strict=False):
            if self._file is None:
                self._file = (self._directory / f"{self._name}.bin").open("wb")
                if mask is not None:
                    self._loss = (self._directory / f"{self._name}.loss.bin").open("wb")
            self._file.write(ids.data)
            if self._loss is not None and mask is not None:
                self._loss.write(mask.data)
            if label is not None:
                self._labels.append(label)
            self._starts.append(self._tokens)
            self._tokens += len(ids)
            if self._tokens * ids.itemsize >= self._shard_bytes:
                self._close_shard()

    def finish(self) -> dict[str, Any]:
        """Closes the last shard; returns the split's entry of the index."""
        self._close_shard()
        return {
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "documents": sum(shard["documents"] for shard in self._shards),
            "bytes": self._text_bytes,
            **self._counts,
            "shards": self._shards,
        }

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}"

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        if self._loss is not None:
            self._loss.close()
            self._loss = None
        np.save(self._directory / f"{self._name}.documents.npy", np.array(self._starts, "<i8"))
        if self._labels:
            np.save(self._directory / f"{self._name}.labels.npy", np.array(self._labels, "<i8"))
            self._labels = []
        self._shards.append({"file": f"{self._name}.bin", "tokens": self._tokens, "documents": len(self._starts)})
        self._file, self._starts, self._tokens = None, array("q"), 0
