"""Micro batches: each rank's part of a global batch that does not depend on how many ranks there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from flows.config import RunError
from flows.config.training import TrainingRun
from flows.data.packed import IGNORED, Row, Sequences
from flows.training.rank_layout import RankLayout

__all__ = ["IGNORED", "Batch", "GlobalBatch", "micro_batches", "to_batch", "validation_batches"]


ReadRecords = Callable[[NDArray[np.int64]], Tensor]
"""What a teacher cache keeps of some sequences of the training split, uint8 [sequences, length, bytes]."""


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
    records_BLR: Tensor | None = None
    """What a teacher cache keeps of each token, uint8 [micro batch, length, bytes]. None: there is no cache."""


@dataclass(frozen=True)
class GlobalBatch:
    """One step's data: iterates over this rank's micro batches."""

    micro_batches: Sequence[Batch]
    sample_ids: NDArray[np.int64]
    """Indices of the sequences that all ranks loaded, in the order of the global batch."""
    loss_tokens: int
    """Targets that count, over all ranks."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.micro_batches)


def micro_batches(
    dataset: Sequences,
    run: TrainingRun,
    step: int,
    device: torch.device | str,
    read_records: ReadRecords | None = None,
) -> GlobalBatch:
    """This rank's micro batches of one step, and what all ranks have loaded for it.

    The global batch is the same for any number of ranks and accumulation steps: it is cut, not drawn. Its loss is the
    mean over its tokens that count, wherever they lie.

    Args:
        dataset: The training split.
        run: The run's configuration.
        step: From 0 on.
        device: Where the batches are put.
        read_records: What a teacher has left for sequences, by their indices; None = nothing.

    Raises:
        RunError: No token of the global batch counts.
    """
    size, layout = run.train.micro_batch_size, RankLayout.of(run, dist.get_rank())
    batch = run.train.global_batch_size
    order = dataset.order(step * batch, batch, run.seed)
    # What each rank has loaded, at its place in the global batch. The largest entry of all ranks is taken, not the
    # sum, so that ranks that work on the same sequences do not count twice.
    loaded = torch.full((2, batch), -1, dtype=torch.int64)
    mine = []
    for micro_step in range(run.gradient_accumulation_steps):
        first = (micro_step * run.dp_size + layout.dp_rank) * size
        places = slice(first, first + size)
        rows = [dataset.row(int(index)) for index in order[places]]
        loaded[0, places] = torch.from_numpy(order[places])
        loaded[1, places] = torch.tensor([int((row.targets_L != IGNORED).sum()) for row in rows])
        micro_batch = to_batch(rows, device)
        if read_records is not None:
            micro_batch = micro_batch._replace(records_BLR=read_records(order[places]).to(device))
        mine.append(_part(micro_batch, layout.sp_rank, run.engine.sequence_parallel_size))
    loaded = loaded.to(device)
    dist.all_reduce(loaded, dist.ReduceOp.MAX)
    sample_ids, counts = loaded.cpu().numpy()
    assert sample_ids.min() >= 0, "a place of the global batch was loaded by no rank"
    total = int(counts.sum())
    if total == 0:
        raise RunError(f"no token of step {step + 1} counts towards the loss; look at the data of this step.")
    # Ranks that share sequences each have a loss of their part, and their gradients are averaged like all others.
    losses = run.gradient_accumulation_steps * run.dp_size * run.engine.sequence_parallel_size
    share = torch.tensor(total / losses, device=device)
    return GlobalBatch([micro_batch._replace(loss_tokens=share) for micro_batch in mine], sample_ids, total)


def validation_batches(
    dataset: Sequences, chosen: NDArray[np.int64], run: TrainingRun, device: torch.device | str
) -> Iterator[Batch]:
    """Yields this rank's micro batches of the chosen sequences: as many and as large ones on every rank.

    Where sequences run out, rows that do not count fill up. `loss_tokens` is 1, so that losses are sums.
    """
    size, layout = run.train.micro_batch_size, RankLayout.of(run, dist.get_rank())
    for first in range(0, len(chosen), size * run.dp_size):
        mine = chosen[first + layout.dp_rank * size : first + (layout.dp_rank + 1) * size]
        filled = np.append(mine, np.repeat(chosen[:1], size - len(mine)))
        batch = to_batch([dataset.row(int(index)) for index in filled], device)
        batch.targets_BL[len(mine) :] = IGNORED
        batch = _part(batch, layout.sp_rank, run.engine.sequence_parallel_size)
        yield batch._replace(loss_tokens=torch.ones((), device=device))


def _part(batch: Batch, part: int, parts: int) -> Batch:
    """Part of each sequence of a batch; document ids stay whole, because attention looks at whole sequences."""
    inputs, targets = (x.tensor_split(parts, dim=1)[part] for x in (batch.input_ids_BL, batch.targets_BL))
    records = None if batch.records_BLR is None else batch.records_BLR.tensor_split(parts, dim=1)[part]
    return batch._replace(input_ids_BL=inputs, targets_BL=targets, records_BLR=records)


def to_batch(rows: Sequence[Row], device: torch.device | str) -> Batch:
    """Rows as one batch, with the number of their targets that count."""
    stacked = [torch.from_numpy(np.stack(part)).to(device) for part in zip(*rows, strict=True)]
    input_ids_BL, targets_BL, document_ids_BL = stacked
    # Attention is faster without a mask, which only rows with a boundary in them need.
    one_document_each = not any(row.document_ids_L[-1] for row in rows)
    loss_tokens = (targets_BL != IGNORED).sum().float()
    return Batch(input_ids_BL, targets_BL, loss_tokens, None if one_document_each else document_ids_BL)
