"""Whether a program computes what its candidate computes: differences against the candidate's own float noise."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flows.compression.quantized_linear import W4A8Linear, W8A8Linear
from flows.export.coded_cache import rounds_cache
from flows.export.runtime import ProgramError
from flows.model.attention import Attention

NOISE_FACTOR = 4.0
"""Two float32 programs may each be off by the noise, and the largest of few samples understates it."""
JITTER = 2.0**-17
"""Relative change of the float tensors of a model that rounds activations to 8 bits: 2^10 below INT8's resolution and
2^13 below E4M3's, enough to tip codes at an edge."""
JITTERED_TWINS = 4
"""What one tipped code does has a long tail: one sample of it understates the next."""
FLOOR_ULPS = 4
"""Tolerance is at least this many units in the last place of the largest score, in float32."""
SHAPES = ((1, 1), (2, 17), (3, 5), (8, 64))
"""Batch sizes and lengths compared."""


class Scoring(Protocol):
    """What is compared with the candidate."""

    def next_token_scores(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores [batch, vocab]."""


@dataclass(frozen=True)
class Parity:
    """What a comparison found."""

    largest_difference: float
    """Largest absolute difference of a score between program and candidate."""
    tolerance: float
    """`NOISE_FACTOR` times the candidate's largest noise on the same inputs, and a few units in the last place."""


@torch.no_grad()
def compare(scores: nn.Module, program: Scoring, vocab_size: int, longest: int | None = None) -> Parity:
    """Runs both on random ids of several shapes, rows padded left and right by different amounts.

    The noise is the largest difference between the candidate in float32 and in float64. Where activations, or keys and
    values, are rounded to 8 bits, rounding errors sometimes tip one over the edge between two codes, a jump far above
    float32's resolution; so that the noise is sure to hold such jumps, the candidate is also compared with itself after
    several tiny jitters. Few rows jump: the median row has to agree as closely as in a float model.

    Args:
        scores: Ids and mask [batch, length] to next-token scores [batch, vocab], on the CPU, in float32.
        program: The same, exported.
        vocab_size: Number of tokens to draw from.
        longest: Positions that the candidate has, in tokens; None = any number.

    Raises:
        ProgramError: They differ by more than the candidate's own noise explains.
    """
    double = deepcopy(scores).double()
    rounds = any(_rounds_activations(module) for module in scores.modules())
    jittered = [_jittered(scores, seed) for seed in range(JITTERED_TWINS if rounds else 0)]
    differences, noises, jumps = [], [], [torch.zeros(1)]
    largest = 0.0
    for ids, mask in sample_inputs(vocab_size, longest):
        expected = scores(ids, mask)
        found = torch.from_numpy(program.next_token_scores(ids.numpy(), mask.numpy()))
        differences.append((found - expected).abs().amax(-1))
        noises.append((double(ids, mask) - expected).abs().amax(-1).float())
        jumps += [(twin(ids, mask) - expected).abs().amax(-1) for twin in jittered]
        largest = max(largest, float(expected.abs().max()))
    floor = FLOOR_ULPS * torch.finfo(torch.float32).eps * largest
    by_row, noise = torch.cat(differences), torch.cat(noises)
    most, typical = float(by_row.max()), float(by_row.median())
    tolerance = NOISE_FACTOR * max(float(noise.max()), float(torch.cat(jumps).max())) + floor
    typical_tolerance = NOISE_FACTOR * float(noise.median()) + floor
    for difference, allowed in ((typical, typical_tolerance), (most, tolerance)):
        if not difference <= allowed:  # also when it is not a number
            raise ProgramError(
                f"the exported program differs from the model by {difference:.3g}; {allowed:.3g} is allowed, "
                f"{NOISE_FACTOR:g} x the model's own float32 noise. For an INT8 model on a CPU without VNNI, whose "
                "integer products saturate, leave out the quantize steps (steps=distill); otherwise check the "
                "versions of torch and onnxruntime."
            )
    return Parity(most, tolerance)


def sample_inputs(vocab_size: int, longest: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Random ids and masks, int64 [batch, length], the same ones every time; odd rows padded left, even ones right."""
    generator = torch.Generator().manual_seed(0)
    for batch, wanted in SHAPES:
        length = wanted if longest is None else min(wanted, longest)
        ids = torch.randint(vocab_size, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            padding = row * (length - 1) // batch
            mask[row, :padding] = 0
            if row % 2 == 0:
                mask[row] = mask[row].flip(0)
        yield ids, mask


def _rounds_activations(module: nn.Module) -> bool:
    if isinstance(module, Attention):
        return rounds_cache(module)
    return isinstance(module, W8A8Linear | W4A8Linear)


def _jittered(scores: nn.Module, seed: int) -> nn.Module:
    twin = deepcopy(scores)
    generator = torch.Generator().manual_seed(seed)
    for tensor in twin.state_dict().values():
        if tensor.dtype == torch.float32:  # never E4M3 codes
            tensor.mul_(1 + JITTER * (2 * torch.rand(tensor.shape, generator=generator) - 1))
    return twin
