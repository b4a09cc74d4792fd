"""What every candidate must be, whatever was done to it: finite, not constant, and able to generate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEW_TOKENS = 16
LEAST_SPREAD = 1e-6
"""Of a score over positions, as a share of the largest score; float32 noise is below."""


@torch.no_grad()
def find_faults(model: nn.Module, prompts_BL: Tensor, goes_on: bool = True) -> list[str]:
    """A sentence for each thing that makes the model no language model at all; empty if there is none.

    Args:
        model: Ids [B, L] to scores [B, L, V].
        prompts_BL: Beginnings of several texts, int64; what follows is drawn from the last L tokens each time.
        goes_on: Whether the model predicts what follows; one that fills in has nothing drawn from it.
    """
    scores_BLV = model(prompts_BL)
    if not bool(scores_BLV.isfinite().all()):
        share = 1 - float(scores_BLV.isfinite().double().mean())
        return [f"{share:.2g} of its scores are not finite"]
    largest = float(scores_BLV.abs().max())
    spread = float(scores_BLV.flatten(0, 1).std(0).max())
    if not spread > LEAST_SPREAD * largest:
        return [f"its scores are the same for every input: they spread by {spread:.2g}, the largest is {largest:.2g}"]
    if not goes_on:
        return []
    generator = torch.Generator().manual_seed(0)
    ids_BL, first = prompts_BL, prompts_BL.shape[1]
    for _ in range(NEW_TOKENS):
        next_BV = model(ids_BL[:, -first:])[:, -1].float().cpu()
        if not bool(next_BV.isfinite().all()):
            return [f"its scores are not finite after {ids_BL.shape[1] - first} generated tokens"]
        drawn_B1 = torch.multinomial(next_BV.softmax(-1), 1, generator=generator)
        ids_BL = torch.cat((ids_BL, drawn_B1.to(ids_BL.device)), dim=1)
    drawn_BL = ids_BL[:, first:]
    if bool((drawn_BL == drawn_BL[0, 0]).all()):
        return [f"all {drawn_BL.numel()} tokens that were drawn from it are the same"]
    return []
