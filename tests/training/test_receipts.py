"""Receipts prove the stream, whatever the ranks, and catch every way in which it can be another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.artifact import Artifact
from flows.config.training import TrainingRun
from flows.data.packed import PackedDataset
from flows.training.receipts import (
    MAX_LINES,
    RECEIPTS,
    ReceiptError,
    ReceiptLog,
    first_link,
    next_link,
    steps_per_line,
    verify_lines,
)

Lines = list[dict[str, Any]]
STEPS = 12


@pytest.fixture
def run(tiny_run: Callable[..., TrainingRun]) -> TrainingRun:
    return tiny_run(max_steps=STEPS)


@pytest.fixture
def dataset(data: dict[str, Artifact], run: TrainingRun) -> PackedDataset:
    return PackedDataset(data["tokens"].path, "train", run.sequence_length)


def receipts(dataset: PackedDataset, steps: list[int], seed: int = 0) -> Lines:
    """What a run writes that trains on the batches of these steps (from 0), in this order."""
    link, lines = first_link("tokens", dataset.sequence_length), []
    for number, step in enumerate(steps, 1):
        link = next_link(link, number, dataset.order(step * 8, 8, seed))
        lines.append({"step": number, "link": link})
    return lines


def test_the_configured_stream_is_proven_on_any_ranks(dataset: PackedDataset, run: TrainingRun) -> None:
    lines = receipts(dataset, list(range(STEPS)))
    proof = verify_lines(lines, dataset, run, "tokens", STEPS)
    assert (proof.steps, proof.samples, proof.link) == (STEPS, 8 * STEPS, lines[-1]["link"])
    four = replace(run, launcher=replace(run.launcher, num_ranks=4), train=replace(run.train, micro_batch_size=1))
    assert verify_lines(lines, dataset, four, "tokens", STEPS) == proof


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tampered", r"the receipt of step 5 is 000000000000"),
        ("missing line", r"receipt 5 is of step 6, where that of step 5 belongs"),
        ("extra line", r"there are 13 receipts for 12 intervals"),
        ("cut", r"receipt 12 is missing, where that of step 12 belongs"),
        ("skipped step", r"between steps 6 and 6 the run saw other"),
        ("repeated step", r"between steps 6 and 6 the run saw other"),
        ("swapped steps", r"between steps 5 and 5 the run saw other"),
        ("other seed", r"between steps 1 and 1 the run saw other"),
        ("other tokens", r"between steps 1 and 1 the run saw other"),
    ],
)
def test_every_other_stream_is_caught(what: str, message: str, dataset: PackedDataset, run: TrainingRun) -> None:
    order, seed, tokens = list(range(STEPS)), 0, "tokens"
    match what:
        case "skipped step":
            order = [0, 1, 2, 3, 4, *range(6, STEPS + 1)]
        case "repeated step":
            order = [0, 1, 2, 3, 4, 4, *range(5, STEPS - 1)]
        case "swapped steps":
            order[4:6] = [5, 4]
        case "other seed":
            seed = 1
        case "other tokens":
            tokens = "other"
    lines = receipts(dataset, order, seed)
    match what:
        case "tampered":
            lines[4]["link"] = "0" * 64
        case "missing line":
            del lines[4]
        case "extra line":
            lines.append({"step": STEPS + 1, "link": lines[-1]["link"]})
        case "cut":
            del lines[-1]
    with pytest.raises(ReceiptError, match=message):
        verify_lines(lines, dataset, run, tokens, STEPS)


def test_a_link_holds_what_came_before_the_step_and_the_order() -> None:
    first, ids = first_link("tokens", 16), np.array([3, 1])
    others = [(first_link("tokens", 17), 1, ids), (first, 2, ids), (first, 1, ids[::-1])]
    assert len({next_link(*link) for link in [(first, 1, ids), *others]}) == 4


def test_a_log_that_goes_on_drops_what_came_after_the_step(tmp_path: Path) -> None:
    log = ReceiptLog(tmp_path, 0, STEPS)
    for step in (1, 2, 3):
        log.write(step, f"{step}" * 64)
    path = tmp_path / RECEIPTS
    path.write_text(path.read_text() + '{"step": 4, "li')  # the run was killed while it wrote
    log = ReceiptLog(tmp_path, 2, STEPS)
    log.write(2, "0" * 64)  # is there already
    log.write(3, "a" * 64)
    assert [json.loads(line)["link"][0] for line in path.read_text().splitlines()] == ["1", "2", "a"]


def test_long_runs_write_few_lines_and_prove_every_step(dataset: PackedDataset, run: TrainingRun) -> None:
    steps = MAX_LINES * 2 + 1
    assert steps_per_line(steps) == 3
    long = replace(run, train=replace(run.train, max_steps=steps))
    for lost, stopped in ((None, 11), (7, 11)):  # stopped early, between two lines
        order = [step for step in range(stopped + 1) if step != lost][:stopped]
        lines = [line for line in receipts(dataset, order) if line["step"] % 3 == 0 or line["step"] == stopped]
        if lost is None:
            assert len(lines) == 4
            assert verify_lines(lines, dataset, long, "tokens", stopped).steps == 11
        else:
            with pytest.raises(ReceiptError, match="between steps 7 and 9 the run saw other"):
                verify_lines(lines, dataset, long, "tokens", stopped)
