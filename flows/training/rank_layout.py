"""Which sequences, and which part of them, a rank works on."""

from __future__ import annotations

from dataclasses import dataclass

from flows.config.training import TrainingRun


@dataclass(frozen=True)
class RankLayout:
    """A rank's place in each kind of parallelism; DeepSpeed's order of ranks.

    Tensor-parallel ranks are neighbours, then sequence-parallel ranks, then data-parallel ranks; pipeline stages are
    farthest apart, because they exchange least.
    """

    dp_rank: int
    """Which part of the global batch."""
    sp_rank: int
    """Which part of its sequences."""
    tp_rank: int
    """Which part of each layer's matrices."""
    pp_stage: int
    """Which part of the layers."""

    @classmethod
    def of(cls, run: TrainingRun, rank: int) -> RankLayout:
        """The place of global rank `rank`."""
        rest, tp_rank = divmod(rank, run.engine.tensor_parallel_size)
        rest, sp_rank = divmod(rest, run.engine.sequence_parallel_size)
        pp_stage, dp_rank = divmod(rest, run.dp_size)
        return cls(dp_rank, sp_rank, tp_rank, pp_stage)
