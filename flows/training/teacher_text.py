"""Stage: text that the teacher writes, for students to train on (sequence-level distillation, arXiv:1606.07947).

A training split like that of a tokens artifact of whole documents (`flows.data.whole_documents`): each document is the
beginning of a training sequence, from its last text on, and what the teacher goes on with, up to the end of the text or
`new_tokens`; only what the teacher wrote counts. Texts are drawn, where the paper searches for the likeliest.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from flows.artifact import Artifact, write_json_atomically
from flows.config.distillation import TextRun
from flows.config.engine import Device
from flows.config.model import Kernels
from flows.data.encode import INDEX
from flows.data.mixture import open_split
from flows.data.packed import Sequences, read_index
from flows.model.checkpoint import load_decoder
from flows.model.continuation import continue_rows, text_starts
from flows.model.decoder import Decoder
from flows.training.batches import to_batch
from flows.training.hardware import this_machine
from flows.training.lesson_plan import AT_ONCE, plan_text
from flows.training.teacher_cache import require_same_tokenizer

SHARD_TEXTS = 4096

logger = logging.getLogger(__name__)


def resumable_as(config: TextRun) -> TextRun:
    """All of it decides what is written."""
    return config


def build(directory: Path, config: TextRun, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes the shards of the training split and `index.json`; says before about how long that takes.

    Args:
        directory: Where they go; shards that an interrupted run finished are kept.
        config: How many texts, and how they are written.
        parents: `teacher`, `tokens`, `tokenizer`.

    Returns:
        `sequences`, `tokens`, `loss_tokens` (written by the teacher), `ended` (texts that ended of themselves).
    """
    tokens_dir = parents["tokens"].path
    require_same_tokenizer(parents["teacher"].path, parents["tokenizer"].path, "teacher")
    index = read_index(tokens_dir)
    dataset = open_split(tokens_dir, "train", config.sequence_length, config.document_masks)
    teacher = load_decoder(parents["teacher"].path, Kernels.auto).requires_grad_(False).eval()
    teacher = teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    _log_plan(teacher, config)
    shards = []
    with tqdm(desc="teacher's text", total=config.sequences, unit="text", disable=None) as progress:
        for number, first in enumerate(range(0, config.sequences, SHARD_TEXTS)):
            last = min(first + SHARD_TEXTS, config.sequences)
            done = directory / f"train-{number:05d}.json"
            if not done.exists():  # it comes last
                shard = _write_shard(directory, number, teacher, dataset, config, range(first, last), index, progress)
                write_json_atomically(done, shard)
                logger.info("teacher's text: %d of %d", last, config.sequences)
            else:
                progress.update(last - first)
            shards.append(json.loads(done.read_text()))
    for left in directory.glob(".*.tmp"):
        left.unlink()
    counts = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "loss_tokens", "ended")}
    kept = {key: index[key] for key in ("dtype", "vocab_size", "eos_token_id")}
    split = {key: counts[key] for key in ("tokens", "documents", "loss_tokens")}
    write_json_atomically(
        directory / INDEX, {**kept, "whole_documents": True, "splits": {"train": {**split, "shards": shards}}}
    )
    return {"sequences": counts["documents"]} | {key: counts[key] for key in ("tokens", "loss_tokens", "ended")}


def _write_shard(
    directory: Path,
    number: int,
    teacher: Decoder,
    dataset: Sequences,
    config: TextRun,
    places: range,
    index: Mapping[str, Any],
    progress: tqdm[Any],
) -> dict[str, Any]:
    """Writes one shard; what the index says about it."""
    texts: list[NDArray[np.int64]] = []
    given: list[int] = []
    ended = 0
    eos_token_id, device = index["eos_token_id"], teacher.lm_head.weight.device
    for first in range(places.start, places.stop, AT_ONCE):
        count = min(AT_ONCE, places.stop - first)
        numbers = dataset.order(first, count, config.seed)
        batch = to_batch([dataset.row(int(sequence)) for sequence in numbers], device)
        prompt = slice(0, config.generation.prompt_tokens)
        given_BP = batch.input_ids_BL[:, prompt]
        documents = None if batch.document_ids_BL is None else batch.document_ids_BL[:, prompt]
        starts_B = text_starts(given_BP, documents, eos_token_id)
        seeds = torch.arange(first, first + count, device=device) + (config.seed << 32)
        written = continue_rows(teacher, given_BP, starts_B, config.generation, seeds).cpu().numpy()
        for start, row, new in zip(starts_B.tolist(), given_BP.cpu().numpy(), written, strict=True):
            ends = np.flatnonzero(new == eos_token_id)
            ended += len(ends) > 0
            new = new[: ends[0] + 1] if len(ends) else new
            texts.append(np.concatenate((row[start:], new)))
            given.append(len(row) - start)
        progress.update(count)
    lengths = np.array([len(text) for text in texts])
    counts = [np.arange(len(text)) >= known for text, known in zip(texts, given, strict=True)]
    name = f"train-{number:05d}"
    _write(directory / f"{name}.bin", np.concatenate(texts).astype(np.dtype(index["dtype"]).newbyteorder("<")))
    _write(directory / f"{name}.loss.bin", np.concatenate(counts).astype(np.uint8))
    np.save(directory / f"{name}.documents.npy", np.cumsum([0, *lengths[:-1]]).astype("<i8"))
    return {
        "file": f"{name}.bin",
        "tokens": int(lengths.sum()),
        "documents": len(texts),
        "loss_tokens": int(sum(one.sum() for one in counts)),
        "ended": int(ended),
    }


def _write(path: Path, values: NDArray[Any]) -> None:
    with path.open("wb") as file:
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _log_plan(teacher: Decoder, config: TextRun) -> None:
    plan = plan_text(teacher.config, teacher.vocab_size, config, this_machine(Device.auto))
    logger.info("teacher's text: %s", plan.in_words())
