"""One model.safetensors from what the ranks hold, compared tensor by tensor with what they hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from torch import Tensor, nn

from flows.config import RunError
from flows.model.checkpoint import load_decoder
from flows.training.engine import gather_weights
from flows.training.fragments import own_fragments

Save = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
CHUNK = 2**20
"""Elements summed at once, so that temporary tensors stay small."""
MULTIPLIER = 0x2545F4914F6CDD1D
"""Odd, its bits well mixed (Vigna, arXiv:1402.6246, xorshift64*); arithmetic is modulo 2^64."""


class ConsolidationError(RunError):
    """The file does not hold what was trained."""


def consolidate(engine: DeepSpeedEngine, directory: Path, save: Save) -> None:
    """Has the weights written as they are trained now, and compares what `load_decoder` reads back; all ranks call it.

    Digests come from each rank's part of the float32 weights, so that they see neither the gathering nor the writing
    that they check.

    Args:
        engine: Whose model it is.
        directory: Where `save` writes.
        save: Writes a model directory of whole weights by name, and returns those that are in it.

    Raises:
        ConsolidationError: A tensor that is gathered or read back is not the one that was trained.
    """
    trained = sharded_digests(engine, dict(engine.module.model.named_parameters()))
    weights = gather_weights(engine.module.model)
    if dist.get_rank() != 0:
        return
    _compare(trained, weights, "gathered from the ranks")
    try:
        written = save(weights)
    except (OSError, SafetensorError) as error:
        for left in directory.glob(".*.tmp"):
            left.unlink()
        needed, free = sum(weight.nbytes for weight in weights.values()), shutil.disk_usage(directory).free
        raise ConsolidationError(
            f"the best weights could not be written to {directory} ({error}). They take {needed / 1e6:.1f} MB and "
            f"{free / 1e6:.1f} MB are free there. Checkpoints are intact: make room and run the same command again. It "
            f"goes on from the newest."
        ) from error
    loaded = load_decoder(directory)
    saved = {name: digest(weight.detach().flatten(), 0) for name, weight in written.items()}
    _compare(saved, dict(loaded.named_parameters()), f"read back from {directory}")
    if loaded.config.tie_word_embeddings and loaded.lm_head.weight is not loaded.model.embed_tokens.weight:
        raise ConsolidationError(f"{directory}: the tied head is read back as a tensor of its own.")


def _compare(wanted: Mapping[str, int], found: Mapping[str, Tensor], how: str) -> None:
    for name, expected in wanted.items():
        value = digest(found[name].detach().flatten(), 0) if name in found else None
        if value != expected:
            raise ConsolidationError(
                f"{name}, {how}, has digest {value}, but was trained to {expected}. Memory, network or file system are "
                f"at fault; checkpoints are intact."
            )


def sharded_digests(engine: DeepSpeedEngine, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """`digest` of every trained parameter in its dtype, from the ranks' fragments; no weight leaves its rank."""
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    sums = dict.fromkeys(trained, 0)
    for fragment in own_fragments(engine, parameters.items()):
        values = fragment.part(fragment.flat).to(parameters[fragment.name].dtype)
        sums[fragment.name] = _wrapped(sums[fragment.name] + digest(values, fragment.start))
    total = torch.tensor([sums[name] for name in trained], device=engine.device)
    dist.all_reduce(total)
    return dict(zip(trained, total.tolist(), strict=True))


def digest(values: Tensor, start: int) -> int:
    """A sum over elements of a mix of each one's bits and position, so that parts can be summed apart; signed 64 bit.

    Args:
        values: Floating-point elements [any]; taken as float32, which loses nothing of a narrower type.
        start: Position of the first one within its tensor.
    """
    total = 0
    for first in range(0, len(values), CHUNK):
        bits = values[first : first + CHUNK].float().view(torch.int32).long()
        position = torch.arange(start + first, start + first + len(bits), device=bits.device)
        mixed = (bits + 1) * (2 * position + 1) * MULTIPLIER
        mixed = mixed ^ (mixed >> 29)
        total = _wrapped(total + int(mixed.sum()))
    return total


def _wrapped(value: int) -> int:
    """Modulo 2^64, as a signed number, like torch's int64."""
    return (value + 2**63) % 2**64 - 2**63
