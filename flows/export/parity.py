"""Whether a program computes what its candidate computes: differences against the candidate's own float noise."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flows.export.runtime import Program, ProgramError

NOISE_FACTOR = 4.0
"""Two float32 programs may each be off by the noise, and the largest of few samples understates it."""
JITTER = 2.0**-20
"""Relative change of an INT8 model's float tensors: far below its resolution, enough to tip codes at an edge."""
SHAPES = ((1, 1), (2, 17), (3, 5), (8, 64))
"""Batch sizes and lengths compared."""


@dataclass(frozen=True)
class Parity:
    """What a comparison found."""

    largest_difference: float
    """Largest absolute difference of a score between program and candidate."""
    tolerance: float
    """`NOISE_FACTOR` times the candidate's float noise on the same inputs."""


@torch.no_grad()
def compare(scores: nn.Module, program: Program, vocab_size: int) -> Parity:
    """Runs both on random ids of several shapes, rows padded left and right by different amounts.

    The noise is the largest difference between the candidate in float32 and in float64. In an INT8 model rounding
    errors sometimes tip an activation over the edge between two codes, a jump far above float32's resolution; so that
    the noise is sure to hold such jumps, the candidate is also compared with itself after a tiny jitter.

    Args:
        scores: Ids and mask [batch, length] to next-token scores [batch, vocab], on the CPU, in float32.
        program: The same, exported.
        vocab_size: Number of tokens to draw from.

    Raises:
        ProgramError: They differ by more than the candidate's own noise explains.
    """
    twins = [deepcopy(scores).double()]
    if any(tensor.dtype == torch.int8 for tensor in scores.buffers()):
        twins.append(_jittered(scores))
    difference = noise = 0.0
    where = ""
    for ids, mask in sample_inputs(vocab_size):
        expected = scores(ids, mask)
        found = torch.from_numpy(program.next_token_scores(ids.numpy(), mask.numpy()))
        noise = max([noise, *(float((expected - twin(ids, mask)).abs().max()) for twin in twins)])
        here = float((found - expected).abs().max())
        if not here <= difference:  # also when it is not a number
            difference, where = here, f"batch {ids.shape[0]} x {ids.shape[1]} tokens"
    tolerance = NOISE_FACTOR * noise
    if not difference <= tolerance:
        raise ProgramError(
            f"the exported program differs from the model by {difference:.3g} at {where}; {tolerance:.3g} is allowed, "
            f"{NOISE_FACTOR:g} x the model's own float32 noise. For an INT8 model on a CPU without VNNI, whose integer "
            "products saturate, set quantize.enabled=false; otherwise check the versions of torch and onnxruntime."
        )
    return Parity(difference, tolerance)


def sample_inputs(vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random ids and masks, int64 [batch, length], the same ones every time; odd rows padded left, even ones right."""
    generator = torch.Generator().manual_seed(0)
    for batch, length in SHAPES:
        ids = torch.randint(vocab_size, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            padding = row * (length - 1) // batch
            mask[row, :padding] = 0
            if row % 2 == 0:
                mask[row] = mask[row].flip(0)
        yield ids, mask


def _jittered(scores: nn.Module) -> nn.Module:
    twin = deepcopy(scores)
    generator = torch.Generator().manual_seed(0)
    for tensor in twin.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + JITTER * (2 * torch.rand(tensor.shape, generator=generator) - 1))
    return twin
