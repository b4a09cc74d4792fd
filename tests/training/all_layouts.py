"""Ranks hand one training state through layouts: `python -m tests.training.all_layouts <directory>`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from flows.config import from_json
from flows.config.training import TrainingRun
from flows.launcher import follow_parent
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize
from flows.training.batches import micro_batches
from flows.training.checkpoint import Checkpoints
from flows.training.consolidation import consolidate
from flows.training.engine import build_engine, close_engine, set_learning_rate, start_process_group, train_step
from flows.training.made_up_tokens import MadeUpTokens
from flows.training.objectives import LossModule, cross_entropy
from flows.training.weight_parts import named_parts
from tests.training.conftest import SEQUENCE_LENGTH, VOCAB_SIZE

UPDATES = 3
WORK = "work.json"


@dataclass(frozen=True)
class Link:
    """A place in a chain of layouts."""

    kind: str
    """Name of the chain."""
    position: int
    """Takes up what the position before has saved; 0 starts the run."""
    run: TrainingRun


@dataclass(frozen=True)
class Work:
    """What one start of the ranks does, one after another."""

    links: list[Link]


def main(directory: Path) -> None:
    """Leaves `<kind>/<position>` with a checkpoint, consolidated weights, and the loss of the update after it."""
    follow_parent()
    start_process_group()
    links = from_json(Work, (directory / WORK).read_text()).links
    for number, link in enumerate(links, start=1):
        engine = hand_on(link, directory / link.kind)
        if number < len(links):
            engine.destroy()
    close_engine(engine)


def hand_on(link: Link, directory: Path) -> Any:
    run, position = link.run, link.position
    dataset = MadeUpTokens(VOCAB_SIZE, SEQUENCE_LENGTH, count=64)
    model = Decoder(run.model, VOCAB_SIZE)
    initialize(model, seed=position)  # so that whatever is not loaded shows
    engine = build_engine(LossModule(model, cross_entropy), run)
    set_learning_rate(engine, 1e-2)
    weights = named_parts(engine)
    state = Checkpoints(directory / str(max(0, position - 1)), engine, weights, run).load()
    while state.step < UPDATES:
        train_step(engine, micro_batches(dataset, run, state.step, "cpu"), state.step)
        state.step += 1
    after = Checkpoints(directory / str(position), engine, weights, run)
    after.save(state)
    best = directory / str(position) / "best"

    def save(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        save_decoder(best, weights, run.model, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
        return weights

    consolidate(engine, best, save)
    loss = train_step(engine, micro_batches(dataset, run, state.step, "cpu"), state.step)
    after.wait()
    if dist.get_rank() == 0:
        (directory / str(position) / "loss.json").write_text(json.dumps(loss))
    return engine


if __name__ == "__main__":
    main(Path(sys.argv[1]))
