# Shape letters are upper case; calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""How much each part of a decoder matters, measured on calibration data in one pass.

Widths by their activations as in Minitron (arXiv:2407.14679, section 2.2): mean over a sequence, root of the sum of
squares over sequences. Layers by the cosine of what enters and leaves them (arXiv:2403.03853), or by the loss without.

Shape letters: B batch, L length, D hidden size, I intermediate size, H query heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from flows.compression.calibration import Calibration
from flows.config.prune import LayerImportance
from flows.data.packed import IGNORED
from flows.model.decoder import Decoder

_READS = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}
"""Linear layers that read the same input as the one that is watched."""


@dataclass
class Importance:
    """Scores of one model; the larger, the more it matters. Layers come in their order."""

    neurons: list[Tensor] = field(default_factory=list)
    """Of each layer, float64 [I]."""
    heads: list[Tensor] = field(default_factory=list)
    """Of each layer, float64 [H]."""
    channels: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Of the residual stream, over all norms, float64 [D]."""
    layers: Tensor = field(default_factory=lambda: torch.zeros(0))
    """float64 [layers]."""
    loss: float = 0.0
    """Of the whole model on the calibration data, nats per token."""
    input_squares: dict[str, Tensor] = field(default_factory=dict)
    """Mean square of each input of each linear layer, by the layer's name, float64 [inputs]."""


@torch.no_grad()
def measure_importance(model: Decoder, calibration: Calibration, layers_by: LayerImportance) -> Importance:
    """Runs the calibration data through the model.

    Args:
        model: In evaluation mode.
        calibration: The data.
        layers_by: What tells which layers matter.
    """
    seen = _Seen()
    with _watched(model, seen):
        whole_loss = mean_loss(model, calibration)
    blocks = [f"model.layers.{number}" for number in range(model.config.num_hidden_layers)]
    if layers_by == LayerImportance.loss:
        layers = torch.tensor([_loss_without(model, number, calibration) for number in range(len(blocks))])
        layers = layers.double() - whole_loss
    else:
        layers = torch.stack([seen.sums[name] / seen.tokens for name in blocks])
    norms = [f"{name}.{read}" for name in blocks for read in ("self_attn.q_proj", "mlp.gate_proj")] + ["lm_head"]
    squares = {name: total / seen.tokens for name, total in seen.squares.items()}
    for name in list(squares):
        parent, _, last = name.rpartition(".")
        squares |= {f"{parent}.{other}": squares[name] for other in _READS.get(last, ())}
    return Importance(
        neurons=[seen.sums[f"{name}.mlp.down_proj"].sqrt() for name in blocks],
        heads=[seen.sums[f"{name}.self_attn.o_proj"].sqrt() for name in blocks],
        channels=torch.stack([seen.sums[name].sqrt() for name in norms]).sum(0),
        layers=layers,
        loss=whole_loss,
        input_squares=squares,
    )


@torch.no_grad()
def mean_loss(model: Decoder, calibration: Calibration) -> float:
    """Cross-entropy over the calibration data, nats per token."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for inputs_BL, targets_BL, documents_BL in calibration.batches(model.vocab_size, device):
        scores = model(inputs_BL, document_ids_BL=documents_BL).flatten(0, 1)
        total += float(cross_entropy(scores, targets_BL.flatten(), ignore_index=IGNORED, reduction="sum"))
        tokens += int((targets_BL != IGNORED).sum())
    return total / tokens


class _Seen:
    """What is added up while the data passes, by name of module, in float64 on the CPU."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.tokens = 0

    def add(self, into: dict[str, Tensor], name: str, value: Tensor) -> None:
        into[name] = into.get(name, torch.zeros_like(value, dtype=torch.float64, device="cpu")) + value.double().cpu()


@contextmanager
def _watched(model: Decoder, seen: _Seen) -> Iterator[None]:
    """While this lasts, linear layers and blocks tell `seen` what passes through them."""
    head_dim = model.config.head_dim
    hooks = []

    def watch_input(name: str, per_head: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_BLN = inputs[0]
            seen.add(seen.squares, name, x_BLN.square().sum((0, 1)))
            size_BLN = x_BLN.unflatten(-1, (-1, head_dim)).norm(dim=-1) if per_head else x_BLN.abs()
            seen.add(seen.sums, name, size_BLN.mean(1).square().sum(0))

        return hook

    def watch_block(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], y_BLD: Tensor) -> None:
            seen.add(seen.sums, name, (1 - cosine_similarity(inputs[0], y_BLD, dim=-1)).sum())

        return hook

    def count(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.tokens += inputs[0].numel()

    watched = ("q_proj", "o_proj", "gate_proj", "down_proj", "lm_head")
    for name, module in model.named_modules():
        if name.endswith(watched):
            hooks.append(module.register_forward_pre_hook(watch_input(name, name.endswith("o_proj"))))
    for number, block in enumerate(model.model.layers):
        hooks.append(block.register_forward_hook(watch_block(f"model.layers.{number}")))
    hooks.append(model.model.embed_tokens.register_forward_pre_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _loss_without(model: Decoder, number: int, calibration: Calibration) -> float:
    whole = model.model.layers
    model.model.layers = nn.ModuleList(block for other, block in enumerate(whole) if other != number)
    try:
        return mean_loss(model, calibration)
    finally:
        model.model.layers = whole
