"""Scales of inputs: found for the layers that read them, and folded into what produces them and into their columns.

y = W x = (W diag(s)) (diag(s)^-1 x): dividing an input by s and multiplying its column with s leaves the model as it
is, and moves what is hard to round from inputs to weights (SmoothQuant, arXiv:2211.10438) or away from the weights that
meet large inputs (AWQ, arXiv:2306.00978). The division costs nothing where a norm or a linear layer takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flows.compression.layer_inputs import Inputs
from flows.model.decoder import Decoder

GRID_POINTS = 20
"""Exponents that `awq_scales` tries, from 0 on; the paper's number."""
LEAST_MAGNITUDE = 1e-5
"""Of inputs and weights: a scale is neither zero nor infinite where nothing was seen."""


@dataclass(frozen=True)
class InputGroup:
    """Linear layers that read the same input, and what produces it."""

    producer: str
    """A norm, or a linear layer whose outputs reach the readers through linear operations only."""
    readers: tuple[str, ...]
    repeats: int = 1
    """How many inputs each of the producer's outputs becomes: query heads that share a value head."""
    head_dim: int = 1
    """Outputs that are repeated together."""


def input_groups(model: Decoder, block: str) -> Iterator[InputGroup]:
    """The groups of a block by names; those that linear layers produce first, so that norms' see their final columns.

    Values reach the output projection as weighted sums over positions, and `up_proj` is multiplied with what
    `gate_proj` gives: both are linear in what they scale.

    Args:
        model: The decoder, without experts.
        block: Name of a layer, e.g. `model.layers.0`; "" = the output projection behind the last.
    """
    config = model.config
    if not block:
        if not config.tie_word_embeddings:
            yield InputGroup("model.norm", ("lm_head",))
        return
    attention, feed = f"{block}.self_attn", f"{block}.mlp"
    repeats = config.num_attention_heads // config.num_key_value_heads
    yield InputGroup(f"{attention}.v_proj", (f"{attention}.o_proj",), repeats, config.head_dim)
    yield InputGroup(f"{feed}.up_proj", (f"{feed}.down_proj",))
    yield InputGroup(f"{block}.input_layernorm", tuple(f"{attention}.{name}_proj" for name in "qkv"))
    yield InputGroup(f"{block}.post_attention_layernorm", (f"{feed}.gate_proj", f"{feed}.up_proj"))


def smoothing_scales(inputs: Inputs, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) for each input (arXiv:2211.10438, equation 4).

    Args:
        inputs: What the layers read.
        weights: Their matrices [N, K]; a column's largest weight is that of all of them.
        alpha: How much of the difficulty goes to the weights.
    """
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp_min(LEAST_MAGNITUDE)
    return inputs.largest.clamp_min(LEAST_MAGNITUDE) ** alpha / of_weights ** (1 - alpha)


def awq_scales(
    inputs: Inputs, weights: Sequence[Tensor], rounded: Callable[[Tensor], Tensor], group: InputGroup
) -> Tensor:
    """Scales mean|x_j|^a with the exponent that leaves the least error in what the layers compute (arXiv:2306.00978).

    Exponent 0 is among them, so that no group gets worse on the calibration data where it is rounded so.

    Args:
        inputs: What the layers read, with `gram`.
        weights: Their matrices [N, K].
        rounded: A matrix to what its codes stand for.
        group: Which inputs have to have one scale.
    """
    assert inputs.gram is not None
    mean = _shared(inputs.magnitudes / inputs.rows, group).clamp_min(LEAST_MAGNITUDE)
    best, least = torch.ones_like(inputs.largest), float("inf")
    for point in range(GRID_POINTS):
        scales = mean ** (point / GRID_POINTS)
        scales = (scales / (scales.max() * scales.min()).sqrt()).to(inputs.largest.dtype)
        error = sum(
            output_error(rounded(weight * scales) / scales - weight, inputs.gram.to(weight.device))
            for weight in weights
        )
        if error < least:
            best, least = scales, error
    return best


def output_error(difference: Tensor, gram: Tensor) -> float:
    """Sum of the squared errors of outputs that a difference of weights [N, K] makes: trace(D X^T X D^T)."""
    wide = difference.double()
    return float(((wide @ gram) * wide).sum())


@torch.no_grad()
def fold_(model: nn.Module, group: InputGroup, scales: Tensor) -> None:
    """Divides what the producer gives by the scales [K] and multiplies the readers' columns with them, in place.

    Scales of inputs that are repeats of one output must be equal.
    """
    producer = model.get_submodule(group.producer)
    own = torch.unflatten(scales, 0, (-1, group.repeats, group.head_dim))[:, 0].flatten()
    for parameter in (producer.weight, getattr(producer, "bias", None)):
        if isinstance(parameter, Tensor):
            parameter.div_(own[:, None] if parameter.dim() == 2 else own)
    for name in group.readers:
        reader = model.get_submodule(name)
        assert isinstance(reader.weight, Tensor)
        reader.weight.mul_(scales)


def _shared(values: Tensor, group: InputGroup) -> Tensor:
    """The mean of inputs that are repeats of one output, in the place of each."""
    split = torch.unflatten(values, 0, (-1, group.repeats, group.head_dim))
    return split.mean(1, keepdim=True).expand_as(split).flatten()
