"""Speed of the tokens stage against its rivals, as ratios within one run: `python -m flows.data.bench`.

The stage reads the corpus from disk, encodes and writes shards. Bare `encode_batch` gets the same texts in memory and
keeps the ids; `datasets.map` reads the same parquet files and writes Arrow files.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.config.data import CorpusConfig, EncodeConfig, TokenizerConfig
from flows.data import encode
from flows.data.packed import map_shards
from flows.data.splits import SPLITS, read_documents_of
from flows.data.tokenizer import END_OF_TEXT_ID, load_tokenizer

REPETITIONS = 3
MIN_RATIO_BARE = 0.9
MIN_RATIO_DATASETS = 1.5


def run() -> None:
    """Prints the ratios on the source text of Python's standard library."""
    with tempfile.TemporaryDirectory() as scratch:
        store = ArtifactStore(Path(scratch) / "artifacts")
        corpus = store.make(Stage("corpus", "flows.data.corpus", CorpusConfig()))
        tokenizer = store.make(Stage("tokenizer", "flows.data.tokenizer", TokenizerConfig(), {"corpus": corpus}))
        compare(Path(scratch), {"corpus": corpus, "tokenizer": tokenizer})


def compare(scratch: Path, parents: Mapping[str, Artifact]) -> None:
    """Prints the median MB/s of the three on a corpus, and the ratios.

    Args:
        scratch: An empty directory for what they write.
        parents: The artifacts `corpus` and `tokenizer`.

    Raises:
        RuntimeError: The stage's ids are not those of bare `encode_batch`.
    """
    corpus = parents["corpus"]
    tokenizer = load_tokenizer(parents["tokenizer"].path)
    texts = [text for split in SPLITS for _, text in read_documents_of(corpus.path, split)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    shards = scratch / "shards"
    shards.mkdir()

    def stage() -> None:
        encode.build(shards, EncodeConfig(), parents)

    def bare() -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    def mapped(processes: int | None = None) -> None:
        files = [str(corpus.path / f"{split}.parquet") for split in SPLITS]
        with tempfile.TemporaryDirectory(dir=scratch) as cache:  # a new one, or it would only read and write once
            documents = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
            documents.map(
                lambda rows: {"ids": [e.ids for e in tokenizer.encode_batch(rows["text"], add_special_tokens=False)]},
                batched=True,
                num_proc=processes,
                remove_columns=documents.column_names,
                load_from_cache_file=False,
                new_fingerprint="bench",
            )

    datasets.disable_progress_bars()
    stage()
    _check_equal(np.concatenate([ids for split in SPLITS for ids in map_shards(shards, split)]), bare())
    cores = len(os.sched_getaffinity(0))
    rivals: dict[str, Callable[[], Any]] = {
        "stage": stage,
        "bare encode_batch": bare,
        "datasets.map": mapped,
        f"datasets.map, num_proc={cores}": lambda: mapped(cores),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(REPETITIONS):
        for name, rival in rivals.items():
            started = time.perf_counter()
            rival()
            seconds[name].append(time.perf_counter() - started)
    speeds = {name: megabytes / statistics.median(times) for name, times in seconds.items()}
    print(f"{megabytes:.1f} MB of text, medians of {REPETITIONS} interleaved repetitions; ids are equal")
    for name, speed in speeds.items():
        print(f"{name:>24} {speed:6.2f} MB/s")
    wanted = {"bare encode_batch": f" (at least {MIN_RATIO_BARE})", "datasets.map": f" (at least {MIN_RATIO_DATASETS})"}
    for name in list(speeds)[1:]:
        print(f"stage against {name}: {speeds['stage'] / speeds[name]:.2f}{wanted.get(name, '')}")


def _check_equal(stream: NDArray[Any], documents: list[list[int]]) -> None:
    expected = np.concatenate([[*ids, END_OF_TEXT_ID] for ids in documents])
    if not np.array_equal(stream, expected):
        raise RuntimeError("the stage's token ids are not those of bare encode_batch; its speed means nothing")


if __name__ == "__main__":
    run()
