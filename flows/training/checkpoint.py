"""Resumable checkpoints: complete or ignored, digests checked before one is trusted."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from flows.artifact import digest_file, write_json_atomically

COMPLETE = "complete.json"
"""Written last, by rank 0, when every rank has written its part; holds the digest of each file."""

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """Everything that the loop has to remember besides the engine; the data order follows from the step."""

    step: int = 0
    """Optimizer updates done."""
    best_loss: float = math.inf
    """Lowest validation loss so far, in nats per token."""
    evals_without_improvement: int = 0
    receipt: str = ""
    """Last link of the chain over the sequences seen so far; see `flows.training.receipts`."""
    loss_tokens: int = 0
    """Targets that counted so far."""


def save_checkpoint(engine: DeepSpeedEngine, directory: Path, state: TrainingState, keep: int) -> None:
    """Writes `directory`/step-<n> on all ranks, marks it complete, then removes all but the newest `keep`.

    DeepSpeed moves its own `latest` file before other ranks have finished, so that a killed rank leaves a checkpoint
    that cannot be loaded; the marker here comes after a barrier.
    """
    tag = f"step-{state.step:08d}"
    engine.save_checkpoint(directory, tag, client_state={"state": asdict(state)}, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        files = sorted(path for path in (directory / tag).rglob("*") if path.is_file() and path.name != COMPLETE)
        digests = {path.relative_to(directory / tag).as_posix(): digest_file(path) for path in files}
        write_json_atomically(directory / tag / COMPLETE, digests)
        for old in _complete_tags(directory)[keep:]:
            shutil.rmtree(directory / old)
    dist.barrier()


def load_newest_checkpoint(engine: DeepSpeedEngine, directory: Path) -> TrainingState:
    """Restores the newest checkpoint that is complete and undamaged; a fresh state if there is none.

    Damaged ones are reported, removed and passed over.
    """
    choice: list[str | None] = [_newest_good_tag(directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(choice, src=0)
    if choice[0] is None:
        return TrainingState()
    _, client_state = engine.load_checkpoint(directory, choice[0])
    return TrainingState(**client_state["state"])


def _newest_good_tag(directory: Path) -> str | None:
    complete = _complete_tags(directory)
    for tag in {path.name for path in directory.glob("step-*")} - set(complete):
        logger.warning("checkpoint %s was cut short and is removed", directory / tag)
        shutil.rmtree(directory / tag)
    for tag in complete:
        damage = _damage(directory / tag)
        if damage is None:
            return tag
        logger.warning("checkpoint %s is damaged (%s) and is removed", directory / tag, damage)
        shutil.rmtree(directory / tag)
    return None


def _complete_tags(directory: Path) -> list[str]:
    """Names of complete checkpoints, newest first."""
    return sorted((path.parent.name for path in directory.glob(f"step-*/{COMPLETE}")), reverse=True)


def _damage(checkpoint: Path) -> str | None:
    try:
        digests = json.loads((checkpoint / COMPLETE).read_text())
    except ValueError:
        return f"{COMPLETE} is not JSON"
    for name, digest in digests.items():
        if not (checkpoint / name).exists():
            return f"{name} is missing"
        if digest_file(checkpoint / name) != digest:
            return f"{name} has changed since it was written"
    return None
