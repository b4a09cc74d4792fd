"""What a rank is told: `run.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.config.training import TrainingRun
from flows.training.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training run and where its inputs and outputs are."""

    run: TrainingRun
    directory: Path
    """The stage's artifact directory, still being made."""
    tokens_dir: Path
    tokens_digest: str
    tokenizer_dir: Path
    validation_dir: Path | None = None
    """Tokens to evaluate on, where those to train on were written by the teacher."""
    teacher_dir: Path | None = None
    """The teacher, where the ranks run it."""
    cache_dir: Path | None = None
    """What was kept of its scores, where they read those."""
    start_dir: Path | None = None
    """The candidate that the weights, or some layers of them, come from, where there is one."""
    hardware: Hardware | None = None
    """What the run was planned for; None where this machine's peak is not known."""

    @property
    def name(self) -> str:
        """The artifact's key: the same when the run is resumed, and no other run's."""
        return self.directory.name.removesuffix(".partial")

    @property
    def log_dir(self) -> Path:
        """Metrics, TensorBoard events and the ranks' logs."""
        return self.directory / "logs"

    @property
    def checkpoint_dir(self) -> Path:
        """Resumable checkpoints, kept until the run is complete."""
        return self.directory / "checkpoints"

    @property
    def best_dir(self) -> Path:
        """Weights with the lowest validation loss so far."""
        return self.checkpoint_dir / "best"
