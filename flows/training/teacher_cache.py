"""Stage: what a teacher expects at each training token, kept for all its students: see `flows.training.record_layout`.

The artifact holds, besides `index.json`:

- `sequences.npy`: which sequence of the training split each row is of, int64 [rows], in the order in which students
  meet them first: positions 0, 1, 2, ... of the shuffled stream (`flows.data.order`), repetitions left out. One that
  covers the whole split serves a run of any length;
- `rows-<number>.bin`: rows of L records of R bytes each, as many in each shard but the last.

Sequences are computed as they are trained on, with document masks and in the shares of a mixture. A shard appears whole
or not at all; a run that was interrupted goes on with the first one that is missing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from flows.artifact import Artifact, digest_file, write_json_atomically
from flows.config import RunError
from flows.config.checks import require
from flows.config.distillation import CacheRun
from flows.config.engine import Device
from flows.config.model import Kernels
from flows.data.mixture import open_split
from flows.data.packed import Sequences
from flows.model.checkpoint import WEIGHTS, load_decoder
from flows.model.decoder import Decoder
from flows.training.batches import to_batch
from flows.training.cache_records import pack_records
from flows.training.hardware import this_machine
from flows.training.lesson_plan import plan_cache
from flows.training.record_layout import RecordLayout

INDEX, SEQUENCES = "index.json", "sequences.npy"
SHARD_BYTES = 2**26
ROWS_AT_ONCE_TOKENS, SCORES_AT_ONCE = 4096, 2**24
"""Tokens that pass through the teacher together, and scores that exist together; bounds on memory."""

logger = logging.getLogger(__name__)


def resumable_as(config: CacheRun) -> CacheRun:
    """All of it decides what the rows are."""
    return config


def build(directory: Path, config: CacheRun, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes the cache; says before how large it will be and about how long that takes.

    Args:
        directory: Where it goes; what an interrupted run left in it is kept.
        config: What is kept.
        parents: `teacher`, `tokens`, `tokenizer`.

    Returns:
        `rows`, `tokens`, `bytes`, `bytes_per_token`, `tail_mass` (mean probability of what was not kept), `plan`.

    Raises:
        ConfigError: It keeps as many tokens as there are, or does not fit on the disk.
    """
    teacher_dir = parents["teacher"].path
    require_same_tokenizer(teacher_dir, parents["tokenizer"].path, "teacher")
    dataset = open_split(parents["tokens"].path, "train", config.sequence_length, config.document_masks, config.mixture)
    teacher = load_decoder(teacher_dir, Kernels.auto).requires_grad_(False).eval()
    teacher = teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    require(
        config.top_k < teacher.vocab_size,
        "distill.cache.top_k",
        config.top_k,
        f"must be less than the {teacher.vocab_size} tokens of the vocabulary",
        f"Set distill.cache.top_k={min(64, teacher.vocab_size // 4)}, or 0 to ask the teacher itself.",
    )
    layout = RecordLayout(config.top_k, teacher.vocab_size)
    rows = first_visits(dataset, config)
    row_bytes = config.sequence_length * layout.record_bytes
    plan = _plan(teacher, config, len(rows), layout)
    at_once = max(1, ROWS_AT_ONCE_TOKENS // config.sequence_length)
    shard_rows = max(1, SHARD_BYTES // row_bytes // at_once) * at_once
    _require_room(directory, config, len(rows) * row_bytes)
    np.save(directory / SEQUENCES, rows)
    shards, tail = [], 0.0
    with tqdm(desc="teacher cache", total=len(rows), unit="sequence", disable=None) as progress:
        for number, first in enumerate(range(0, len(rows), shard_rows)):
            part, path = rows[first : first + shard_rows], directory / f"rows-{number:05d}.bin"
            if not path.exists():
                _write_shard(path, teacher, dataset, part, layout, at_once, progress)
                logger.info("teacher cache: %d of %d sequences", first + len(part), len(rows))
            else:
                progress.update(len(part))
            written = np.memmap(path, np.uint8, "r").reshape(-1, layout.record_bytes)
            tail += float(np.exp(written[:, -2:].copy().view("<f2").astype(np.float64)).sum())
            shards.append({"file": path.name, "rows": len(part)})
    for left in directory.glob(".*.tmp"):
        left.unlink()
    tokens = len(rows) * config.sequence_length
    write_json_atomically(
        directory / INDEX,
        {
            "top_k": config.top_k,
            "vocab_size": teacher.vocab_size,
            "sequence_length": config.sequence_length,
            "tokens_digest": parents["tokens"].digest,
            "weights_digest": digest_file(teacher_dir / WEIGHTS),
            "tokenizer_digest": digest_file(parents["tokenizer"].path / "tokenizer.json"),
            "shards": shards,
        },
    )
    size = {"rows": len(rows), "tokens": tokens, "bytes": len(rows) * row_bytes}
    return size | {"bytes_per_token": layout.record_bytes, "tail_mass": tail / tokens, "plan": plan}


def first_visits(dataset: Sequences, config: CacheRun) -> NDArray[np.int64]:
    """The sequences at the first positions of the stream, each once, in the order of their first visits, int64 [rows].

    Of one corpus an epoch holds each once; of a mixture some come again before others have come.
    """
    order = dataset.order(0, config.sequences, config.seed)
    _, places = np.unique(order, return_index=True)
    return order[np.sort(places)]


def require_same_tokenizer(directory: Path, tokenizer_dir: Path, role: str) -> None:
    """Raises `RunError` unless a model of the chain carries the very tokenizer of the run."""
    mine, theirs = directory / "tokenizer.json", tokenizer_dir / "tokenizer.json"
    if not mine.exists() or digest_file(mine) != digest_file(theirs):
        raise RunError(
            f"the {role} in {directory} has another tokenizer than this run: tokens of the two mean different text, "
            "and their scores cannot be compared. Train both on the tokens of one tokenizer: set "
            "data.tokenizer.directory to the model that one of them starts from, and draw the other's weights "
            "(initial_weights=null)."
        )


class TeacherCache:
    """The records of a cache, memory-mapped.

    Args:
        directory: Path of the artifact.
    """

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        self.layout = RecordLayout(index["top_k"], index["vocab_size"])
        shape = (index["sequence_length"], self.layout.record_bytes)
        self._shards = [
            np.memmap(directory / shard["file"], np.uint8, "r", shape=(shard["rows"], *shape))
            for shard in index["shards"]
        ]
        self._starts = np.cumsum([0, *(shard["rows"] for shard in index["shards"])])
        sequences = np.load(directory / SEQUENCES)
        self._by_number = np.argsort(sequences)
        self._numbers = sequences[self._by_number]
        self._directory = directory

    def records(self, sequences: NDArray[np.int64]) -> Tensor:
        """Records of some sequences of the training split, uint8 [len(sequences), L, R].

        Raises:
            RunError: A sequence is not in the cache.
        """
        places = np.minimum(np.searchsorted(self._numbers, sequences), len(self._numbers) - 1)
        missing = sequences[self._numbers[places] != sequences]
        if len(missing):
            raise RunError(
                f"the teacher cache in {self._directory} lacks sequence {missing[0]}: it is of a shorter run or of "
                "another order. Run the chain again; it makes the cache that this run needs."
            )
        rows = self._by_number[places]
        numbers = np.searchsorted(self._starts, rows, "right") - 1
        found = [self._shards[number][row - self._starts[number]] for number, row in zip(numbers, rows, strict=True)]
        return torch.from_numpy(np.stack(found))


def require_cache_of(cache: Artifact, teacher: Artifact, tokens: Artifact, tokenizer: Artifact) -> None:
    """Raises `RunError` unless a cache was made from these weights, tokens and this tokenizer."""
    index = json.loads((cache.path / INDEX).read_text())
    wanted = {
        "weights_digest": digest_file(teacher.path / WEIGHTS),
        "tokens_digest": tokens.digest,
        "tokenizer_digest": digest_file(tokenizer.path / "tokenizer.json"),
    }
    for name, digest in wanted.items():
        if index[name] != digest:
            raise RunError(
                f"the teacher cache in {cache.path} has {name}={index[name][:12]}, and this run {digest[:12]}: it is "
                "of another teacher or other data. Remove it, and run the chain again."
            )


@torch.no_grad()
def _write_shard(
    path: Path,
    teacher: Decoder,
    dataset: Sequences,
    sequences: NDArray[np.int64],
    layout: RecordLayout,
    at_once: int,
    progress: tqdm[Any],
) -> None:
    device = teacher.lm_head.weight.device
    scored = max(1, SCORES_AT_ONCE // teacher.vocab_size)
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        for first in range(0, len(sequences), at_once):
            batch = to_batch([dataset.row(int(number)) for number in sequences[first : first + at_once]], device)
            hidden_ND = teacher.forward_hidden(batch.input_ids_BL, document_ids_BL=batch.document_ids_BL).flatten(0, 1)
            for start in range(0, len(hidden_ND), scored):
                scores_NV = teacher.lm_head(hidden_ND[start : start + scored])
                file.write(pack_records(layout, scores_NV).numpy().tobytes())
            progress.update(len(batch.input_ids_BL))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _plan(teacher: Decoder, config: CacheRun, rows: int, layout: RecordLayout) -> dict[str, float | None]:
    """Logs size and time; the time is None where this machine's peak is not known."""
    hardware = this_machine(Device.auto)
    plan = plan_cache(teacher.config, layout, rows * config.sequence_length, config.sequence_length, hardware)
    logger.info("teacher cache: %s", plan.in_words())
    return {"bytes": plan.num_bytes, "seconds": plan.seconds}


def _require_room(directory: Path, config: CacheRun, size: int) -> None:
    there = sum(path.stat().st_size for path in directory.glob("rows-*.bin"))
    free = shutil.disk_usage(directory).free
    require(
        size - there <= free,
        "distill.cache.top_k",
        config.top_k,
        f"makes a cache of {size / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free in {directory.parent}",
        f"Set distill.cache.top_k={max(1, config.top_k * free // (2 * size))}, fewer steps, or make room.",
    )
