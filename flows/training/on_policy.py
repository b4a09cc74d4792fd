# Shape letters are upper case.
"""On-policy distillation: in some steps the student writes the text that it is taught on (GKD, arXiv:2306.13649).

Which steps, and what is drawn, follows from the run's seed, the step and a sequence's place in the global batch alone:
a resumed run and one on another number of ranks do the same, but for rounding.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from flows.config.training import TrainingRun
from flows.data.packed import IGNORED
from flows.model.continuation import continue_rows, text_starts
from flows.model.decoder import Decoder
from flows.training.batches import Batch, GlobalBatch
from flows.training.rank_layout import RankLayout


def students_turn(run: TrainingRun, step: int) -> bool:
    """Whether the student writes the text of a step; the same on all ranks."""
    if run.on_policy_share == 0:
        return False
    return bool(np.random.default_rng([run.seed, step]).random() < run.on_policy_share)


def taught_batches(
    engine: DeepSpeedEngine, batches: GlobalBatch, run: TrainingRun, step: int, eos_token_id: int
) -> GlobalBatch:
    """The step's batches, or what the student goes on with after the beginnings of their sequences.

    Args:
        engine: Whose model writes; its loss is told whose text it is.
        batches: Of the data.
        run: How often, and how much is written.
        step: Number of the step, from 0 on.
        eos_token_id: Token that ends a text.
    """
    engine.module.wrote_itself = students_turn(run, step)
    if not engine.module.wrote_itself:
        return batches
    model = cast(Decoder, engine.module.model)
    size, layout = run.train.micro_batch_size, RankLayout.of(run, dist.get_rank())
    written = []
    for micro_step, batch in enumerate(batches):
        first = (micro_step * run.dp_size + layout.dp_rank) * size
        places = torch.arange(first, first + size, device=batch.input_ids_BL.device)
        # the draws of a row: any function of seed, step and place that tells them apart
        seeds = (run.seed * run.train.max_steps + step) * run.train.global_batch_size + places
        written.append(own_batch(model, batch, run, seeds, eos_token_id))
    count = torch.tensor([float((batch.targets_BL != IGNORED).sum()) for batch in written]).sum().to(engine.device)
    dist.all_reduce(count)
    total = int(count)
    share = count / (run.gradient_accumulation_steps * run.dp_size)
    return GlobalBatch([batch._replace(loss_tokens=share) for batch in written], batches.sample_ids, total)


def own_batch(model: Decoder, batch: Batch, run: TrainingRun, seeds_B: Tensor, eos_token_id: int) -> Batch:
    """A micro batch of the student's own text; what was given does not count, nor what follows its end."""
    given = run.generation.prompt_tokens
    given_BP = batch.input_ids_BL[:, :given]
    documents_BP = None if batch.document_ids_BL is None else batch.document_ids_BL[:, :given]
    starts_B = text_starts(given_BP, documents_BP, eos_token_id)
    written_BN = continue_rows(model, given_BP, starts_B, run.generation, seeds_B)
    tokens_BL = torch.cat((given_BP, written_BN), 1)
    ends_BN = (written_BN == eos_token_id).long()
    ended_BN = ends_BN.cumsum(1) - ends_BN > 0
    targets_BL = torch.full_like(tokens_BL[:, 1:], IGNORED)
    targets_BL[:, given - 1 :] = written_BN.masked_fill(ended_BN, IGNORED)
    ids_BL = None
    if documents_BP is not None:
        order_L = torch.arange(tokens_BL.shape[1] - 1, device=tokens_BL.device)
        known_BL = torch.cat((documents_BP, documents_BP[:, -1:].expand(-1, written_BN.shape[1] - 1)), 1)
        ids_BL = known_BL + ((order_L >= starts_B[:, None]) & (given_BP[:, -1:] == eos_token_id)).long()
    return batch._replace(input_ids_BL=tokens_BL[:, :-1], targets_BL=targets_BL, document_ids_BL=ids_BL)
