"""Structured pruning: which parts stay, by their importance, and the smaller decoder that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.compression.importance import Importance
from flows.config.model import ModelConfig


@dataclass(frozen=True)
class Kept:
    """Numbers of the parts that stay, in rising order; those of layers come in the order of the layers that stay."""

    layers: list[int]
    channels: list[int]
    """Of the residual stream, the same ones everywhere."""
    neurons: list[list[int]]
    heads: list[list[int]]
    """Query heads."""
    groups: list[list[int]]
    """Key and value heads."""


def choose_parts(importance: Importance, source: ModelConfig, shape: ModelConfig, layers: Sequence[int]) -> Kept:
    """The most important parts, as many as the new shape has.

    Args:
        importance: Measured on the model.
        source: Its shape.
        shape: What is left of it.
        layers: Which layers stay; empty = the most important ones.
    """
    chosen = list(layers) or _best(importance.layers, shape.num_hidden_layers)
    heads, groups = [], []
    for number in chosen:
        per_layer = _choose_heads(importance.heads[number], source, shape)
        heads.append(per_layer[0])
        groups.append(per_layer[1])
    return Kept(
        layers=chosen,
        channels=_best(importance.channels, shape.hidden_size),
        neurons=[_best(importance.neurons[number], shape.intermediate_size) for number in chosen],
        heads=heads,
        groups=groups,
    )


def keep_parts(
    state: Mapping[str, Tensor], kept: Kept, head_dim: int, norm_scale: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """The weights that stay, by their names in the smaller decoder.

    Without some channels a norm divides by the root mean square of those that stay: D of D' channels with the sum of
    squares S give sqrt(S / D') where all gave sqrt(S_all / D). `norm_scale` undoes the mean change.

    Args:
        state: Weights of the whole decoder by name.
        kept: What stays.
        head_dim: Width of an attention head.
        norm_scale: Factor for the weights of norms of the residual stream, by name; None = 1.
    """
    channels = torch.tensor(kept.channels)
    scale = norm_scale or {}
    small = {
        name: tensor.index_select(-1, channels) * scale.get(name, 1.0)
        for name, tensor in state.items()
        if not name.startswith("model.layers.")
    }
    for new, old in enumerate(kept.layers):
        neurons = torch.tensor(kept.neurons[new])
        queries, keys = (_rows(numbers[new], head_dim) for numbers in (kept.heads, kept.groups))
        outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": neurons, "up_proj": neurons}
        inputs = {"o_proj": queries, "down_proj": neurons}
        prefix = f"model.layers.{old}."
        for name in (name for name in state if name.startswith(prefix)):
            part, kind = name.removeprefix(prefix).split(".")[-2:]
            tensor = state[name]
            if tensor.dim() == 2:
                tensor = tensor.index_select(0, outputs.get(part, channels))
                tensor = tensor.index_select(1, inputs.get(part, channels))
            elif kind == "bias":
                tensor = tensor.index_select(0, outputs[part])
            elif part.endswith("layernorm"):
                tensor = tensor.index_select(0, channels) * scale.get(name, 1.0)
            small[f"model.layers.{new}.{name.removeprefix(prefix)}"] = tensor
    return {name: tensor.contiguous() for name, tensor in small.items()}


def norm_scales(importance: Importance, state: Mapping[str, Tensor], kept: Kept) -> dict[str, float]:
    """How much larger the root mean square of the channels that stay is than that of all, for each norm by name.

    Measured on the calibration data: what a norm gives is its input over the root mean square, times its weight.
    """
    reads = {"input_layernorm": "self_attn.q_proj", "post_attention_layernorm": "mlp.gate_proj"}
    places = {"model.norm.weight": "lm_head"}
    for number in kept.layers:
        places |= {
            f"model.layers.{number}.{norm}.weight": f"model.layers.{number}.{reader}" for norm, reader in reads.items()
        }
    scales = {}
    for norm, reader in places.items():
        weight = state[norm].double().cpu()
        squares = importance.input_squares[reader] / weight.square().clamp_min(1e-12)
        scales[norm] = float((squares[kept.channels].mean() / squares.mean()).sqrt())
    return scales


def _choose_heads(scores: Tensor, source: ModelConfig, shape: ModelConfig) -> tuple[list[int], list[int]]:
    """Query heads, and groups: the groups whose query heads matter most together, of each its best query heads."""
    grouped = scores.view(source.num_key_value_heads, -1)
    groups = _best(grouped.sum(1), shape.num_key_value_heads)
    per_group = shape.num_attention_heads // shape.num_key_value_heads
    heads = [group * grouped.shape[1] + head for group in groups for head in _best(grouped[group], per_group)]
    return heads, groups


def _best(scores: Tensor, count: int) -> list[int]:
    """Numbers of the `count` largest scores, in rising order; of equal ones the first."""
    order = scores.argsort(descending=True, stable=True)[:count]
    return sorted(order.tolist())


def _rows(heads: Sequence[int], head_dim: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()
