"""Ulysses: ranks hold parts of the same sequences and trade tokens for heads in attention (arXiv:2309.14509).

DeepSpeed's own bookkeeping of sequence-parallel ranks averages gradients wrongly below ZeRO-3. It is not told of them
here: each rank counts as a data-parallel one whose loss is the sum over its tokens. Then the mean of all ranks'
gradients is that of the whole batch, at every ZeRO stage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from flows.config.training import TrainingRun
from flows.model.attention import Visible, attend
from flows.model.decoder import Decoder, DecoderLayer
from flows.training.rank_layout import RankLayout


def share_sequences(model: Decoder, run: TrainingRun) -> None:
    """Makes a decoder work on this rank's part of each sequence; does nothing without sequence parallelism."""
    size = run.engine.sequence_parallel_size
    if size == 1:
        return
    groups: dict[RankLayout, list[int]] = {}
    for other in range(dist.get_world_size()):
        groups.setdefault(replace(RankLayout.of(run, other), sp_rank=0), []).append(other)
    mine = RankLayout.of(run, dist.get_rank())
    made = {place: dist.new_group(ranks) for place, ranks in groups.items()}  # every rank has to make every group
    group = made[replace(mine, sp_rank=0)]
    model.model.first_position = mine.sp_rank * (run.sequence_length // size)
    for layer in model.model.layers:
        cast(DecoderLayer, layer).self_attn.attend = _Ulysses(group)


class _WholeSequences(nn.Module):
    """Attention over whole sequences, of some heads, with tokens before heads: [B, L, H, K]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible).transpose(1, 2)


class _Ulysses(nn.Module):
    """`attend` over sequences of which each rank of the group holds a part."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self._attention = DistributedAttention(_WholeSequences(), group, scatter_idx=2, gather_idx=1)

    def forward(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, visible: Visible) -> Tensor:
        tokens_first = (x.transpose(1, 2).contiguous() for x in (q_BHLK, k_BGLK, v_BGLK))
        y_BLHK: torch.Tensor = self._attention(*tokens_first, 0, visible=visible)
        return y_BLHK.transpose(1, 2)
