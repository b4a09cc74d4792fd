"""Micro batches: each rank's part of a global batch that does not depend on how many ranks there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from flows.config import RunError
from flows.config.training import TrainingRun
from flows.data.packed import sample_order

IGNORED = -100
"""Target that adds nothing to the loss; torch.nn.functional.cross_entropy's default."""


class Batch(NamedTuple):
    """One micro batch, in the order of `LossModule.forward`'s arguments."""

    input_ids_BL: Tensor
    """int64 [micro batch, length]."""
    targets_BL: Tensor
    """int64 [micro batch, length]; `IGNORED` where no loss is taken."""
    loss_tokens: Tensor
    """Targets that count in the whole global batch, divided by the micro batches it is cut into; float32 []."""
    document_ids_BL: Tensor | None = None
    """int64 [micro batch, length]: number of the token's document within its row, never falling. None: each row is one
    document, or documents may look at each other."""


class Sequences(Protocol):
    """Packed sequences, each int64 [sequence_length + 1]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.int64]: ...


def micro_batches(dataset: Sequences, run: TrainingRun, step: int, device: torch.device | str) -> Iterator[Batch]:
    """Yields this rank's micro batches of one step.

    The global batch is the same for any number of ranks and accumulation steps: it is cut, not drawn. Its loss is the
    mean over its tokens that count, wherever they lie.

    Raises:
        RunError: No token of the global batch counts.
    """
    size, ranks, rank = run.train.micro_batch_size, dist.get_world_size(), dist.get_rank()
    batch = run.train.global_batch_size
    order = sample_order(len(dataset), step * batch, batch, run.seed)
    mine = []
    for micro_step in range(run.gradient_accumulation_steps):
        first = (micro_step * ranks + rank) * size
        mine.append(to_batch([dataset[int(i)] for i in order[first : first + size]], device))
    total = sum((micro_batch.loss_tokens for micro_batch in mine), torch.zeros((), device=device))
    dist.all_reduce(total)
    if float(total) == 0:
        raise RunError(f"no token of step {step + 1} counts towards the loss; look at the data of this step.")
    share = total / (run.gradient_accumulation_steps * ranks)
    for micro_batch in mine:
        yield micro_batch._replace(loss_tokens=share)


def to_batch(sequences: list[NDArray[np.int64]], device: torch.device | str) -> Batch:
    """Packed sequences [length + 1] each as inputs and next-token targets, with the number that count."""
    tokens = torch.from_numpy(np.stack(sequences)).to(device)
    targets_BL = tokens[:, 1:]
    return Batch(tokens[:, :-1], targets_BL, (targets_BL != IGNORED).sum().float())
