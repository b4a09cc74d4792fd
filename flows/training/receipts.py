"""Sample receipts: a hash chain over the sequences that a run was trained on, and its verification.

Each step's link is sha256(link before + number of the step + indices of the sequences that all ranks loaded). The
first link names the tokens artifact and the length of a sequence. The chain is kept in the checkpoint, so that a run
that was interrupted carries it on; it does not depend on ranks, micro batches or accumulation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.artifact import MANIFEST, ArtifactError, load_artifact, read_manifest
from flows.config import RunError, from_json
from flows.config.training import TrainingRun
from flows.data.mixture import open_split
from flows.data.packed import Sequences

RECEIPTS = "receipts.jsonl"
MAX_LINES = 1000
"""Receipts of a longer run stand for several steps each, so that the file stays below 200 kB."""


class ReceiptError(RunError):
    """A run did not see the stream that its configuration and tokens describe, or its receipts were changed."""


def first_link(tokens_digest: str, sequence_length: int) -> str:
    """The beginning of a chain: the sequences that indices stand for."""
    return hashlib.sha256(f"{tokens_digest} {sequence_length}".encode()).hexdigest()


def next_link(link: str, step: int, sample_ids: NDArray[np.int64]) -> str:
    """The link that follows when step `step` (from 1) was trained on these sequences, in this order."""
    ids = np.ascontiguousarray(sample_ids, "<i8").tobytes()
    return hashlib.sha256(bytes.fromhex(link) + step.to_bytes(8, "little") + ids).hexdigest()


def steps_per_line(max_steps: int) -> int:
    """Steps that one receipt stands for."""
    return math.ceil(max_steps / MAX_LINES)


class ReceiptLog:
    """Appends to receipts.jsonl; rank 0 only.

    Args:
        log_dir: Where it is written.
        step: Step that the run resumes from: later lines, from a run that was interrupted, are dropped.
        max_steps: Length of the run.
    """

    def __init__(self, log_dir: Path, step: int, max_steps: int) -> None:
        self._path = log_dir / RECEIPTS
        self._interval = steps_per_line(max_steps)
        kept = [line for line in _lines(self._path, complete=False) if line["step"] <= step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._written = kept[-1]["step"] if kept else 0

    def write(self, step: int, link: str, last: bool = False) -> None:
        """Writes the receipt of a step, if it ends an interval or the run."""
        if step > self._written and (step % self._interval == 0 or last):
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "link": link}) + "\n")
            self._written = step


@dataclass(frozen=True)
class Verified:
    """What was proven."""

    steps: int
    samples: int
    link: str
    """Last link of the chain."""


def verify_receipts(directory: Path) -> Verified:
    """Recomputes a training artifact's stream and compares every receipt.

    Args:
        directory: A training stage's artifact, in its store: the tokens artifact is looked for beside it.

    Raises:
        ReceiptError: A receipt is missing, changed or out of place, or the run saw other sequences.
        ArtifactError: An artifact is missing or damaged.
    """
    manifest = _manifest(directory)
    run = from_json(TrainingRun, json.dumps(manifest["ingredients"]["config"]))
    parent = manifest["parents"]["tokens"]
    tokens_dir = directory.parent / parent["key"]
    try:
        tokens = load_artifact(tokens_dir)
    except FileNotFoundError:
        raise ArtifactError(
            f"{tokens_dir}, the tokens that it was trained on, does not exist. Make it again."
        ) from None
    dataset = open_split(tokens.path, "train", run.sequence_length, run.document_masks, run.mixture)
    metrics = manifest["metrics"]
    verified = verify_lines(
        list(_lines(directory / "logs" / RECEIPTS)), dataset, run, tokens.digest, int(metrics["steps"])
    )
    if verified.link != metrics["receipt"]:
        raise ReceiptError(
            f"{MANIFEST} says that the chain ends with {metrics['receipt'][:12]}, the stream gives "
            f"{verified.link[:12]}. The model was not trained on what the receipts say."
        )
    return verified


def verify_lines(
    lines: list[dict[str, Any]], dataset: Sequences, run: TrainingRun, tokens_digest: str, steps: int
) -> Verified:
    """Compares receipts with the stream.

    Args:
        lines: Of receipts.jsonl.
        dataset: The training split.
        run: The run's configuration.
        tokens_digest: Digest of the tokens artifact.
        steps: Steps that were trained.

    Raises:
        ReceiptError: See `verify_receipts`.
    """
    interval = steps_per_line(run.train.max_steps)
    expected = [*range(interval, steps + 1, interval)]
    expected += [steps] if steps % interval else []
    found = [line["step"] for line in lines]
    for number, step in enumerate(expected):
        if number >= len(found) or found[number] != step:
            what = f"is of step {found[number]}" if number < len(found) else "is missing"
            raise ReceiptError(f"receipt {number + 1} {what}, where that of step {step} belongs. {_NOT_PROVEN}")
    if len(found) > len(expected):
        raise ReceiptError(f"there are {len(found)} receipts for {len(expected)} intervals. {_NOT_PROVEN}")
    batch = run.train.global_batch_size
    link, done = first_link(tokens_digest, run.sequence_length), 0
    for line in lines:
        for step in range(done, line["step"]):
            link = next_link(link, step + 1, dataset.order(step * batch, batch, run.seed))
        if line["link"] != link:
            raise ReceiptError(
                f"the receipt of step {line['step']} is {line['link'][:12]}, and the configuration and the tokens "
                f"give {link[:12]}: between steps {done + 1} and {line['step']} the run saw other sequences or another "
                f"order, or the receipt was changed. {_NOT_PROVEN}"
            )
        done = line["step"]
    return Verified(steps, steps * batch, link)


_NOT_PROVEN = "It is not proven what the model was trained on; train it again."


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = read_manifest(directory)
    except FileNotFoundError:
        raise ArtifactError(f"{directory} is no finished artifact. Name one, or the directory of a run.") from None
    if "receipt" not in manifest["metrics"]:
        raise ArtifactError(f"{directory} was made by stage {manifest['stage']}, which keeps no receipts.")
    return manifest


def _lines(path: Path, complete: bool = True) -> Iterator[dict[str, Any]]:
    """Receipts of a file; a last line that was cut short is left out unless the file has to be complete."""
    if not path.exists():
        return
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            yield {"step": int(line["step"]), "link": str(line["link"])}
        except (ValueError, KeyError, TypeError):
            if not complete:
                return
            raise ReceiptError(f"line {number} of {path} is no receipt. {_NOT_PROVEN}") from None
