# Shape letters are upper case; calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""What linear layers are given on calibration data, block by block, each behind blocks that are quantized already.

Shape letters: B batch, L length, D hidden size, K inputs of a layer, R rows of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flows.compression.calibration import Calibration
from flows.model.attention import Visible, angles, positions, visible_keys
from flows.model.decoder import Decoder

SAMPLED_ROWS = 512
"""Inputs of a layer that are kept as they are, to see what quantization does to what it computes."""


@dataclass
class Inputs:
    """What one linear layer was given, or several that read the same."""

    largest: Tensor
    """Largest magnitude of each input [K]."""
    magnitudes: Tensor
    """Sum of the magnitudes of each input, float64 [K]."""
    gram: Tensor | None
    """Sum of products of inputs with each other, X^T X, float64 [K, K]; None = not wanted."""
    rows: int = 0
    sample: list[Tensor] = field(default_factory=list)
    """Some of the inputs [R, K], in parts."""

    @classmethod
    def of_width(cls, columns: int, with_gram: bool, device: torch.device) -> Inputs:
        """Nothing seen yet."""
        gram = torch.zeros(columns, columns, dtype=torch.float64, device=device) if with_gram else None
        empty = torch.zeros(columns, device=device)
        return cls(empty, empty.double(), gram)

    def add(self, x: Tensor) -> None:
        """Counts inputs [..., K]."""
        flat = x.detach().flatten(0, -2).float()
        self.largest = torch.maximum(self.largest, flat.abs().amax(0))
        self.magnitudes += flat.abs().double().sum(0)
        if self.gram is not None:
            self.gram += flat.double().t() @ flat.double()
        self.rows += flat.shape[0]
        if sum(len(part) for part in self.sample) < SAMPLED_ROWS:
            self.sample.append(flat[:: max(1, len(flat) // 64)][:64].clone())  # some of each batch

    def divided(self, scales: Tensor) -> Inputs:
        """The same inputs, each divided by its scale [K]."""
        gram = None if self.gram is None else self.gram / (scales.double()[:, None] * scales.double())
        return replace(
            self,
            largest=self.largest / scales,
            magnitudes=self.magnitudes / scales.double(),
            gram=gram,
            sample=[part / scales for part in self.sample],
        )


@dataclass(frozen=True)
class _Stream:
    """Calibration data in front of a block."""

    x_BLD: Tensor
    rotation: tuple[Tensor, Tensor]
    visible: Visible


@torch.no_grad()
def walk_blocks(model: Decoder, calibration: Calibration, with_gram: bool) -> Iterator[dict[str, Inputs]]:
    """Inputs of the linear layers of each block by name, then those of the output projection.

    The block whose inputs were handed out last may be changed in place before the next are asked for: the data goes
    through it as it is then.

    Args:
        model: In evaluation mode; its embedding in the form that it is to have.
        calibration: The data.
        with_gram: Whether to add up products of inputs.
    """
    streams = list(_entering(model, calibration))
    for number, block in enumerate(model.model.layers):
        seen: dict[str, Inputs] = {}
        with _watched(block, f"model.layers.{number}", seen, with_gram):
            for stream in streams:
                block(stream.x_BLD, stream.rotation, stream.visible)
        yield seen
        streams = [replace(one, x_BLD=block(one.x_BLD, one.rotation, one.visible)) for one in streams]
    head = Inputs.of_width(model.config.hidden_size, with_gram, streams[0].x_BLD.device)
    for stream in streams:
        head.add(model.model.norm(stream.x_BLD))
    yield {"lm_head": head}


def _entering(model: Decoder, calibration: Calibration) -> Iterator[_Stream]:
    stack = model.model
    for ids_BL, _, documents_BL in calibration.batches(model.vocab_size, stack.norm.weight.device):
        x_BLD = stack.embed_tokens(ids_BL)
        rotation = angles(positions(ids_BL, None, documents_BL), stack.head_dim, stack.rope_theta)
        yield _Stream(x_BLD, rotation, visible_keys(x_BLD, stack.head_dim, stack.kernels, None, documents_BL))


@contextmanager
def _watched(block: nn.Module, prefix: str, seen: dict[str, Inputs], with_gram: bool) -> Iterator[None]:
    """While this lasts, what linear layers of a block are given is counted; layers that read the same share it."""
    read: dict[str, tuple[str, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_BLK = inputs[0]
            first, counted = read.get("last", ("", x_BLK[:0]))
            if first and counted is x_BLK:
                seen[name] = seen[first]
                return
            if name not in seen:
                seen[name] = Inputs.of_width(x_BLK.shape[-1], with_gram, x_BLK.device)
            seen[name].add(x_BLK)
            read["last"] = (name, x_BLK)

        return hook

    hooks = [
        layer.register_forward_pre_hook(watch(f"{prefix}.{name}"))
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
