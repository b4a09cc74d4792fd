"""Stage `tokens`: cleaned text to memory-mapped shards of token ids, each document closed by the end-of-text token."""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flows.artifact import Artifact, write_json_atomically
from flows.config.data import EncodeConfig
from flows.data.splits import SPLITS, read_documents_of
from flows.data.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size

INDEX = "index.json"
PARALLELISM = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Token ids of several documents."""

    documents: list[NDArray[Any]]
    """Ids of each document, end-of-text token included."""
    text_bytes: int


def build(directory: Path, config: EncodeConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes the shards of every split and `index.json`, which describes them.

    `<split>-<number>.bin` holds raw little-endian ids, `<split>-<number>.documents.npy` the int64 offset of each
    document's first token. No document straddles two shards.
    """
    tokenizer_dir = parents["tokenizer"].path
    vocab_size = vocabulary_size(tokenizer_dir)
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    corpus = parents["corpus"]
    total_bytes = sum(split["bytes"] for split in corpus.metrics["splits"].values())
    splits = {}
    started = time.perf_counter()
    with tqdm(desc="encode", total=total_bytes, unit="B", unit_scale=True, disable=None) as progress:
        for split in SPLITS:
            writer = _ShardWriter(directory, split, config.shard_bytes)
            texts = (text for _, text in read_documents_of(corpus.path, split))
            for batch in encode_batches(tokenizer_dir, texts, config.batch_bytes, dtype):
                writer.write(batch)
                progress.update(batch.text_bytes)
            splits[split] = writer.finish()
    seconds = time.perf_counter() - started
    index = {
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "eos_token_id": end_of_text_id(tokenizer_dir),
        "splits": splits,
    }
    write_json_atomically(directory / INDEX, index)
    sizes = {
        split: {name: value for name, value in entry.items() if name != "shards"} for split, entry in splits.items()
    }
    return {
        "splits": sizes,
        "bytes_per_token": total_bytes / sum(entry["tokens"] for entry in sizes.values()),
        "megabytes_per_second": total_bytes / 1e6 / seconds,
    }


def encode_batches(
    tokenizer_dir: Path, texts: Iterable[str], batch_bytes: int, dtype: np.dtype[Any]
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
        encodings = own.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        return EncodedBatch([np.array([*encoding.ids, end], dtype) for encoding in encodings], text_bytes)

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

    def write(self, batch: EncodedBatch) -> None:
        self._text_bytes += batch.text_bytes
        for ids in batch.documents:
            if self._file is None:
                self._file = (self._directory / f"{self._name}.bin").open("wb")
            self._file.write(ids.data)
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
            "shards": self._shards,
        }

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}"

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        np.save(self._directory / f"{self._name}.documents.npy", np.array(self._starts, "<i8"))
        self._shards.append({"file": f"{self._name}.bin", "tokens": self._tokens, "documents": len(self._starts)})
        self._file, self._starts, self._tokens = None, array("q"), 0
