"""Resumable checkpoints in one form for every way to share work among ranks; complete or not there at all.

Each rank writes the fragments it owns (`flows.training.fragments`) into `.step-<n>.partial`; when all are on disk, the
first rank adds a manifest with the digest of every file and renames the directory to `step-<n>`. Ranks that resume read
the fragments that they need, however those had been cut.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from torch import nn

from flows.artifact import (
    MANIFEST,
    ArtifactError,
    digest_file,
    digest_json,
    flush_to_disk,
    read_manifest,
    write_json_atomically,
)
from flows.config import RunError
from flows.config.engine import PARALLELISM
from flows.config.training import TrainingRun
from flows.training.fragment_files import Piece, PieceReader, pieces_of, restore, write_pieces
from flows.training.fragments import held_fragments, inner_optimizer, is_on_nvme, own_fragments, spread_weights
from flows.training.weight_parts import whole_name, whole_shape

logger = logging.getLogger(__name__)
PARTIAL = ".partial"
"""End of the name of a checkpoint that is being written or removed."""
Weights = Mapping[str, nn.Parameter]


class CheckpointError(RunError):
    """A checkpoint could not be written, or none of those that are there can be used."""


@dataclass
class TrainingState:
    """Everything that the loop has to remember besides the engine, as JSON values; data order follows from the step."""

    step: int = 0
    """Optimizer updates done."""
    best_loss: float = math.inf
    """Lowest validation loss so far, in nats per token."""
    evals_without_improvement: int = 0
    receipt: str = ""
    """Last link of the chain over the sequences seen so far; see `flows.training.receipts`."""
    loss_tokens: int = 0
    """Targets that counted so far."""
    layouts: list[dict[str, Any]] = field(default_factory=list)
    """From which step on how many ranks trained at which ZeRO stage, and how they shared the model besides."""


class Checkpoints:
    """The checkpoints of one training run; every method is called by all ranks alike.

    Args:
        directory: Holds `step-<n>` directories, and `damaged-step-<n>` where one was found to be so.
        engine: The engine whose state is saved and loaded, between two optimizer updates.
        weights: This rank's parameters by their name in the model.
        run: How many checkpoints stay, and what ranks share.
    """

    def __init__(self, directory: Path, engine: DeepSpeedEngine, weights: Weights, run: TrainingRun) -> None:
        self._directory, self._engine, self._weights, self._run = directory, engine, weights, run
        self._writer = ThreadPoolExecutor(1)
        self._unfinished: Future[None] | None = None
        self._group = dist.new_group(backend="gloo")  # for the writer alone: collectives of two threads would mix

    def save(self, state: TrainingState) -> None:
        """Saves as of `state`; waits for the save before, if that is still being written.

        Raises:
            CheckpointError: This save or the one before failed on some rank; it is gone, earlier ones are as they were.
        """
        self.wait()
        asynchronous = self._run.train.asynchronous_checkpoints
        pieces: Iterable[Piece] = pieces_of(
            own_fragments(self._engine, self._weights.items()), copy=asynchronous or is_on_nvme(self._engine)
        )
        if asynchronous:
            pieces = list(pieces)
            needed = sum(tensor.nbytes for *_, tensor in pieces)
        else:
            mine = own_fragments(self._engine, self._weights.items())
            needed = sum(tensor.nbytes for fragment in mine for _, tensor in fragment.tensors())
        self._unfinished = self._writer.submit(self._write, asdict(state), pieces, needed)
        if not asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
            CheckpointError: It failed.
        """
        if self._unfinished is not None:
            unfinished, self._unfinished = self._unfinished, None
            unfinished.result()

    @contextmanager
    def finished_on_error(self) -> Iterator[None]:
        """Completes the save that is being written before a fault that all ranks met alike ends them."""
        try:
            yield
        except RunError:
            self.wait()
            raise

    def load(self) -> TrainingState:
        """Restores the newest checkpoint that is whole; a fresh state if there never was one.

        What a save that was cut short had written is removed. A damaged checkpoint is reported and kept aside: reading
        it again may go well where a disk or network has failed for a moment, and it shows what happened.

        Raises:
            CheckpointError: There are checkpoints and all are damaged, or the newest whole one is of another model.
        """
        names = self._on_rank_0(self._clean_up)
        for name in names:
            manifest, damage = self._verify(self._directory / name)
            if damage is None:
                return self._restore(self._directory / name, manifest)
            if dist.get_rank() == 0:
                logger.warning("checkpoint %s is damaged (%s) and is kept aside", self._directory / name, damage)
                (self._directory / name).rename(self._directory / f"damaged-{name}")
        if names:
            raise CheckpointError(
                f"every checkpoint in {self._directory} is damaged (what is wrong with each is in the log of rank 0). "
                f"They are kept there as damaged-step-<n>. To train from the start, run the same command again."
            )
        return self._with_layout(TrainingState())

    def _write(self, state: dict[str, Any], pieces: Iterable[Piece], needed: int) -> None:
        final = self._directory / f"step-{state['step']:08d}"
        aside = self._directory / f".{final.name}{PARTIAL}"
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = {"needed": needed, "shapes": _shapes(self._weights), "files": {}, "error": None}
        try:
            aside.mkdir(parents=True, exist_ok=True)
            paths = write_pieces(aside, f"rank-{rank:05d}-of-{ranks:05d}", pieces)
            mine["files"] = {path.name: digest_file(path) for path in paths}
        except (OSError, SafetensorError) as error:
            mine["error"] = f"rank {rank}: {error}"
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, mine, group=self._group)
        outcome: list[str | None] = [self._finish(aside, final, state, everyone) if rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise CheckpointError(outcome[0])

    def _finish(self, aside: Path, final: Path, state: dict[str, Any], everyone: list[Any]) -> str | None:
        """Makes a checkpoint of what all ranks have written; what to tell the user if that cannot be."""
        failed = [mine["error"] for mine in everyone if mine["error"]]
        try:
            if not failed:
                manifest = {"state": state}
                for part in ("shapes", "files"):
                    manifest[part] = {name: value for mine in everyone for name, value in mine[part].items()}
                write_json_atomically(aside / MANIFEST, manifest | {"digest": digest_json(manifest)})
                flush_to_disk(aside)
                aside.rename(final)
                flush_to_disk(self._directory)
                self._prune()
                return None
        except OSError as error:
            failed = [f"rank 0: {error}"]
        shutil.rmtree(aside, ignore_errors=True)
        needed, free = sum(mine["needed"] for mine in everyone), shutil.disk_usage(self._directory).free
        return (
            f"checkpoint {final} could not be written ({'; '.join(failed)}). It takes {needed / 1e6:.1f} MB and "
            f"{free / 1e6:.1f} MB are free there. Earlier checkpoints are intact: "
            f"{', '.join(self._complete()) or 'there are none'}. Make room or set a lower train.keep_checkpoints, and "
            f"run the same command again to go on from the newest."
        )

    def _clean_up(self) -> list[str]:
        for path in self._directory.glob(f".step-*{PARTIAL}"):
            logger.warning("checkpoint %s was cut short and is removed", path)
            shutil.rmtree(path)
        return self._complete()

    def _complete(self) -> list[str]:
        """Names of finished checkpoints, newest first."""
        return sorted((path.name for path in self._directory.glob("step-*")), reverse=True)

    def _prune(self) -> None:
        every = self._run.train.keep_every_steps
        for name in self._complete()[self._run.train.keep_checkpoints :]:
            if not (every and int(name.removeprefix("step-")) % every == 0):
                gone = self._directory / f".{name}{PARTIAL}"  # so that an interrupted removal leaves no damaged one
                (self._directory / name).rename(gone)
                shutil.rmtree(gone)

    def _verify(self, checkpoint: Path) -> tuple[dict[str, Any], str | None]:
        """The manifest, and what is wrong; each rank reads its share of the files."""
        manifest, damage = self._on_rank_0(lambda: _read_checked_manifest(checkpoint))
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = [
            _file_damage(checkpoint / name, digest)
            for name, digest in [*manifest.get("files", {}).items()][rank::ranks]
        ]
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, [*filter(None, mine)], group=self._group)
        return manifest, damage or "; ".join(text for found in everyone for text in found) or None

    def _restore(self, checkpoint: Path, manifest: dict[str, Any]) -> TrainingState:
        state = TrainingState(**manifest["state"])
        saved_shapes = _whole_shapes(manifest["shapes"])
        for name, shape in _whole_shapes(_shapes(self._weights)).items():
            saved = saved_shapes.get(name)
            if saved != shape:
                raise CheckpointError(
                    f"checkpoint {checkpoint} is of another model: {name} has shape {saved} there and {shape} here. "
                    f"Remove {self._directory} to train from the start."
                )
        optimizer = inner_optimizer(self._engine)
        with PieceReader((checkpoint / name for name in manifest["files"]), manifest["shapes"]) as reader:
            fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
            restore(
                held_fragments(self._engine, self._weights.items()), reader, self._engine.device if fused else "cpu"
            )
        spread_weights(self._engine)
        self._engine.global_steps = state.step
        self._engine.micro_steps = state.step * self._engine.gradient_accumulation_steps()
        self._engine.global_samples = state.step * self._engine.train_batch_size()
        return self._with_layout(state)

    def _with_layout(self, state: TrainingState) -> TrainingState:
        engine = self._run.engine
        kinds = {name: size for name in PARALLELISM if (size := getattr(engine, name)) > 1}
        layout = {"ranks": dist.get_world_size(), "zero_stage": engine.zero_stage, **kinds}
        if not state.layouts or state.layouts[-1] != {"from_step": state.layouts[-1]["from_step"], **layout}:
            state.layouts.append({"from_step": state.step, **layout})
        return state

    def _on_rank_0(self, call: Callable[[], Any]) -> Any:
        """What `call` returns on rank 0, on all ranks."""
        result = [call() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(result, src=0, group=self._group)
        return result[0]


def _shapes(weights: Weights) -> dict[str, list[int]]:
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in weights.items() if p.requires_grad}


def _whole_shapes(shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {whole_name(name): whole_shape(name, shape) for name, shape in shapes.items()}


def _read_checked_manifest(checkpoint: Path) -> tuple[dict[str, Any], str | None]:
    try:
        manifest = read_manifest(checkpoint)
        if manifest.pop("digest") == digest_json(manifest):
            return manifest, None
        return {}, f"{MANIFEST} has changed since it was written"
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except (ArtifactError, KeyError, AttributeError, TypeError) as error:
        return {}, f"{MANIFEST}: {error}"


def _file_damage(path: Path, digest: str) -> str | None:
    if not path.exists():
        return f"{path.name} is missing"
    return None if digest_file(path) == digest else f"{path.name} has changed since it was written"
