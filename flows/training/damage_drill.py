"""Damages checkpoints in every way and resumes: `python -m flows.training.damage_drill <run.json>`, one per rank."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from flows.artifact import MANIFEST, write_json_atomically
from flows.config import from_json
from flows.config.training import TrainingRun
from flows.launcher import follow_parent
from flows.model.decoder import Decoder, initialize
from flows.training.batches import micro_batches
from flows.training.checkpoint import CheckpointError, Checkpoints, TrainingState
from flows.training.engine import build_engine, close_engine, set_learning_rate, start_process_group, train_step
from flows.training.made_up_tokens import MadeUpTokens
from flows.training.objectives import LossModule, cross_entropy
from flows.training.weight_parts import named_parts

VOCAB_SIZE = 64
STEPS, SAVED_AFTER = 4, (1, 3)
OLDER, NEWEST = (f"step-{step:08d}" for step in SAVED_AFTER)
CUTS, FLIPS = 20, 20


@dataclass(frozen=True)
class DamageJob:
    """What a rank of the drill is told."""

    run: TrainingRun
    directory: Path
    """Empty; `outcomes.json` is written into it."""


@dataclass(frozen=True)
class Damage:
    """One thing that happens to a directory of checkpoints."""

    name: str
    happen: Callable[[Path], None]
    resumes_at: int | None
    """Step of the checkpoint that is the newest whole one afterwards; None = there is none."""


def damages(seed: int) -> Iterator[Damage]:
    """Cuts and flips at random places of the newest checkpoint, files missing, all damaged."""
    places = random.Random(seed)
    for number in range(CUTS):
        alone = number % 2 == 0
        yield Damage(f"cut {number}", partial(cut, NEWEST, places.random(), alone), SAVED_AFTER[0])
    for number in range(FLIPS):
        yield Damage(f"bit flipped {number}", partial(flip, NEWEST, places.random()), SAVED_AFTER[0])
    yield Damage(f"no {MANIFEST}", lose_manifest, SAVED_AFTER[0])
    yield Damage("save cut short", cut_save_short, SAVED_AFTER[0])
    yield Damage("nothing", lambda _: None, SAVED_AFTER[1])
    yield Damage("all damaged", damage_all, None)


def lose_manifest(checkpoints: Path) -> None:
    """Removes the newest checkpoint's manifest."""
    (checkpoints / NEWEST / MANIFEST).unlink()


def cut_save_short(checkpoints: Path) -> None:
    """Leaves what a killed save leaves."""
    (checkpoints / NEWEST).rename(checkpoints / f".{NEWEST}.partial")


def damage_all(checkpoints: Path) -> None:
    """Leaves no whole checkpoint."""
    cut(OLDER, 0.5, True, checkpoints)
    flip(NEWEST, 0.5, checkpoints)


def cut(name: str, share: float, alone: bool, checkpoints: Path) -> None:
    """Cuts the file `share` of the way into a checkpoint and, unless `alone`, removes what was written later."""
    path, position = _locate(checkpoints / name, share)
    files = _as_written(checkpoints / name)
    for later in [] if alone else files[files.index(path) + 1 :]:
        later.unlink()
    with path.open("r+b") as file:
        file.truncate(position)


def flip(name: str, share: float, checkpoints: Path) -> None:
    """Flips one bit of a checkpoint, `share` of the way into it."""
    path, position = _locate(checkpoints / name, share)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _as_written(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.iterdir(), key=lambda path: (path.name == MANIFEST, path.name))


def _locate(checkpoint: Path, share: float) -> tuple[Path, int]:
    files = _as_written(checkpoint)
    position = int(share * sum(path.stat().st_size for path in files))
    for path in files:
        if position < path.stat().st_size:
            return path, position
        position -= path.stat().st_size
    raise AssertionError("a share below 1 lies within the files")


def main(job: DamageJob) -> None:
    """Trains a small model on made-up tokens, and goes on from a copy of its checkpoints after each damage."""
    run = replace(job.run, train=replace(job.run.train, keep_checkpoints=len(SAVED_AFTER)))
    start_process_group()
    dataset = MadeUpTokens(VOCAB_SIZE, run.sequence_length, STEPS * run.train.global_batch_size)
    model = Decoder(run.model, VOCAB_SIZE)
    initialize(model, run.seed)
    engine = build_engine(LossModule(model, cross_entropy), run)
    set_learning_rate(engine, run.train.optimizer.learning_rate)
    weights = named_parts(engine)

    def train(state: TrainingState) -> float:
        loss = train_step(engine, micro_batches(dataset, run, state.step, engine.device), state.step)
        state.step += 1
        return loss

    whole = Checkpoints(job.directory / "whole", engine, weights, run)
    state, losses = whole.load(), []
    while state.step < STEPS:
        losses.append(train(state))
        if state.step in SAVED_AFTER:
            whole.save(state)
    whole.wait()
    outcomes = {}
    directory = job.directory / "damaged"
    damaged = Checkpoints(directory, engine, weights, run)
    for damage in damages(run.seed):
        if dist.get_rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(job.directory / "whole", directory)
            damage.happen(directory)
        dist.barrier()
        outcomes[damage.name] = "ok"
        try:
            state = damaged.load()
        except CheckpointError as error:
            if damage.resumes_at is not None:
                outcomes[damage.name] = str(error)
            continue
        resumed_at = state.step
        again = [train(state) for _ in range(STEPS - state.step)]
        if resumed_at != damage.resumes_at:
            outcomes[damage.name] = f"resumed at step {resumed_at}, not {damage.resumes_at}"
        elif again != losses[resumed_at:]:
            outcomes[damage.name] = f"losses {again} after it, and {losses[resumed_at:]} without it"
    if dist.get_rank() == 0:
        write_json_atomically(job.directory / "outcomes.json", outcomes)
    close_engine(engine)


if __name__ == "__main__":
    follow_parent()
    main(from_json(DamageJob, Path(sys.argv[1]).read_text()))
