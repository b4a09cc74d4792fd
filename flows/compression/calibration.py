"""Calibration data: sequences of the training split that are drawn once and named in the artifact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flows.artifact import digest_json
from flows.config.calibration import CalibratedConfig
from flows.data.mixture import open_split
from flows.data.packed import Sequences

SCORES_LIMIT = 2**24
"""Scores held at once; bounds memory at any vocabulary size."""


@dataclass(frozen=True)
class Calibration:
    """What was drawn."""

    dataset: Sequences
    indices: NDArray[np.int64]
    """Numbers of the sequences [S]; an epoch draws none twice."""
    sequence_length: int

    def batches(self, vocab_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Inputs [B, L], targets [B, L] and document ids [B, L], or None where no sequence holds several documents."""
        size = max(1, min(16, SCORES_LIMIT // (self.sequence_length * vocab_size)))
        for start in range(0, len(self.indices), size):
            rows = [self.dataset.row(int(index)) for index in self.indices[start : start + size]]
            inputs, targets, documents = (np.stack(part) for part in zip(*rows, strict=True))
            ids = torch.from_numpy(documents).to(device) if documents.any() else None
            yield torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), ids

    def to_metrics(self) -> dict[str, int | str]:
        """What names the choice: number of sequences and tokens, sha256 of the sequences' numbers."""
        tokens = len(self.indices) * self.sequence_length
        digest = digest_json(self.indices.tolist())
        return {"sequences": len(self.indices), "tokens": tokens, "digest": digest}


def draw_calibration(tokens_dir: Path, config: CalibratedConfig) -> Calibration:
    """The configured number of training sequences, in the shuffled order of the configured seed.

    Args:
        tokens_dir: The encoded corpora.
        config: How many, and how they are cut.
    """
    dataset = open_split(tokens_dir, "train", config.sequence_length, config.document_masks, config.mixture)
    chosen = config.calibration
    indices = dataset.order(0, min(chosen.sequences, len(dataset)), chosen.seed)
    return Calibration(dataset, indices, config.sequence_length)
