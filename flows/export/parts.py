# Shape letters are upper case; calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""Consecutive layers of a decoder, which one of several ranks computes, and how layers are shared out among ranks.

The first part has the embedding, the last one the final norm and the output projection; where these two are one matrix,
each of the two parts has it. Parts hand on the residual stream.

Shape letters: B batch, L length, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from flows.export.shipped.layers import Arrays, Layers
from flows.export.shipped.pipeline import part_path
from flows.model.decoder import Decoder


class DecoderPart(nn.Module):
    """What is computed of a decoder in one place: its layers from `first` up to `behind`.

    Args:
        model: The whole decoder.
        first: Number of the first layer.
        behind: Number of the layer behind the last one.
        number: Of this part; what parts hand on is named after it, so that none fits in another one's place.
    """

    def __init__(self, model: Decoder, first: int, behind: int, number: int = 0) -> None:
        super().__init__()
        stack = model.model
        self.number = number
        self.is_first, self.is_last = first == 0, behind == len(stack.layers)
        self.layers = stack.layers[first:behind]
        if self.is_first:
            self.embed_tokens = stack.embed_tokens
        if self.is_last:
            self.norm, self.lm_head = stack.norm, model.lm_head
        self.head_dim, self.rope_theta, self.kernels = stack.head_dim, stack.rope_theta, stack.kernels
        self.hidden_size = model.config.hidden_size

    @property
    def given(self) -> str:
        """Name of what it is given: token ids, or the residual stream."""
        return "input_ids" if self.is_first else f"hidden_{self.number - 1}"

    @property
    def made(self) -> str:
        """Name of what it makes: the residual stream, or scores."""
        return "logits" if self.is_last else f"hidden_{self.number}"

    def example(self, ids_BL: Tensor) -> Tensor:
        """Something of the form that it is given."""
        return ids_BL if self.is_first else torch.zeros(*ids_BL.shape, self.hidden_size)

    def enter(self, given: Tensor) -> Tensor:
        """Residual stream [B, L, D] before the first of its layers."""
        return self.embed_tokens(given) if self.is_first else given

    def leave(self, x_BLD: Tensor, places_B: Tensor) -> Tensor:
        """Scores [B, V] at one position of each row, or the residual stream as it is for the next part."""
        if not self.is_last:
            return x_BLD
        rows = torch.arange(x_BLD.shape[0], device=x_BLD.device)
        return self.lm_head(self.norm(x_BLD)[rows, places_B])


class PartsInTurn:
    """All parts of a program in this process, one after the other.

    Args:
        program: The file that the program would have if it were whole.
        parts: How many there are.
        cache_bytes: Memory of the keys and values of all layers, for a program that keeps them.
        num_layers: How many layers that are.
    """

    def __init__(self, program: Path, parts: int, cache_bytes: int = 0, num_layers: int = 0) -> None:
        self._parts = [Layers(part_path(program, number), 0, cache_bytes, num_layers) for number in range(parts)]
        self.num_pages, self.page_tokens = self._parts[0].num_pages, self._parts[0].page_tokens
        self.width = self._parts[-1].width

    def run(self, given: Arrays) -> Arrays:
        """See `flows.export.shipped.layers.Layers.run`."""
        for part in self._parts:
            given = part.run(given)
        return given


def share_layers(model: Decoder, parts: int) -> list[tuple[int, int]]:
    """First layer of each part and the one behind its last, such that the largest part has as few bytes as possible."""
    sizes = [_bytes(layer) for layer in model.model.layers]
    sizes[0] += _bytes(model.model.embed_tokens)
    sizes[-1] += _bytes(model.lm_head)
    return list(pairwise((0, *_cuts(sizes, parts), len(sizes))))


def _cuts(sizes: Sequence[int], parts: int) -> tuple[int, ...]:
    """Where to cut a row of sizes, so that the largest sum between two cuts is as small as possible."""

    @cache
    def best(first: int, left: int) -> tuple[int, tuple[int, ...]]:
        if left == 1:
            return sum(sizes[first:]), ()
        found = []
        for cut in range(first + 1, len(sizes) - left + 2):
            largest, cuts = best(cut, left - 1)
            found.append((max(sum(sizes[first:cut]), largest), (cut, *cuts)))
        return min(found)

    return best(0, parts)[1]


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in module.state_dict().values())
