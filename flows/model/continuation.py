# Shape letters are upper case; calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""Text that a decoder writes while it is a torch module: many rows at once, keys and values kept.

Shape letters: B rows, P tokens given, N tokens written, S tokens that pass through the model together, G key and value
heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from flows.config.distillation import GenerationConfig
from flows.model.attention import Attend, Visible, allowed_keys, angles, attend, positions
from flows.model.decoder import Decoder, DecoderLayer
from kernels.sample_tokens import sample_tokens


@torch.no_grad()
def continue_rows(
    model: Decoder, given_BP: Tensor, starts_B: Tensor, config: GenerationConfig, seeds_B: Tensor
) -> Tensor:
    """Tokens that the model writes after those given, int64 [B, N]; it goes on after an end of text.

    A row's tokens depend on no other row, but for rounding: draws follow from its seed and the number of the token.

    Args:
        model: Its weights are whole on this rank. It is in evaluation mode meanwhile.
        given_BP: Beginnings, int64.
        starts_B: Where in each row its text begins; what is before it is not looked at.
        config: How many tokens, and how they are drawn.
        seeds_B: Of the draws, int64.
    """
    rows, given = given_BP.shape
    device, count = given_BP.device, config.new_tokens
    real_BS = torch.arange(given + count, device=device) >= starts_B[:, None]
    written_BN = torch.empty(rows, count, dtype=torch.int64, device=device)
    temperature = torch.full((rows,), config.temperature, device=device)
    everything = torch.zeros(rows, dtype=torch.int64, device=device)
    with _kept_attention(model, rows, given + count - 1) as kept:
        new_BS, past = given_BP, 0
        for number in range(count):
            end = past + new_BS.shape[1]
            scores_BV = _scores(model, new_BS, real_BS[:, :end], past)
            for one in kept:
                one.past = end
            written_BN[:, number] = sample_tokens(
                scores_BV,
                temperature,
                everything,
                torch.ones_like(temperature),
                seeds_B,
                torch.full_like(seeds_B, number),
                model.config.kernels.value,
            )
            new_BS, past = written_BN[:, number : number + 1], end
    return written_BN


def text_starts(given_BP: Tensor, document_ids_BP: Tensor | None, eos_token_id: int) -> Tensor:
    """Where the last text of each row begins, int64 [B]: at the end of the one before, where that is all there is.

    Args:
        given_BP: Beginnings.
        document_ids_BP: Number of each token's document; None = all texts of a row may be looked at.
        eos_token_id: Token that closes a text.
    """
    if document_ids_BP is None:
        return torch.zeros_like(given_BP[:, 0])
    given = given_BP.shape[1]
    starts_B = (document_ids_BP != document_ids_BP[:, -1:]).sum(1)
    return starts_B.where(given_BP[:, -1] != eos_token_id, given - 1)


def _scores(model: Decoder, new_BS: Tensor, real_BE: Tensor, past: int) -> Tensor:
    """Scores [B, V] of the token after the last new one, the others' keys and values being kept."""
    stack = model.model
    x_BSD = stack.embed_tokens(new_BS)
    place_BS = positions(new_BS, real_BE.long(), None, past)
    rotation = angles(place_BS, stack.head_dim, stack.rope_theta)
    allowed = allowed_keys(real_BE.long()) if past == 0 else real_BE[:, None, None]
    for layer in stack.layers:
        x_BSD = layer(x_BSD, rotation, allowed)
    return model.lm_head(stack.norm(x_BSD[:, -1:]))[:, 0]


class _KeptKeys:
    """`attend` of one layer that keeps keys and values [B, G, S, K] of all tokens so far."""

    def __init__(self, rows: int, tokens: int) -> None:
        self._shape = rows, tokens
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.past = 0

    def __call__(self, q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible) -> Tensor:
        if self._keys is None or self._values is None:
            rows, tokens = self._shape
            self._keys = k_BGSK.new_empty(rows, k_BGSK.shape[1], tokens, k_BGSK.shape[3])
            self._values = torch.empty_like(self._keys)
        end = self.past + k_BGSK.shape[2]
        self._keys[:, :, self.past : end], self._values[:, :, self.past : end] = k_BGSK, v_BGSK
        return attend(q_BHSK, self._keys[:, :, :end], self._values[:, :, :end], visible)


@contextmanager
def _kept_attention(model: Decoder, rows: int, tokens: int) -> Iterator[Sequence[_KeptKeys]]:
    layers = [cast(DecoderLayer, layer).self_attn for layer in model.model.layers]
    kept = [_KeptKeys(rows, tokens) for _ in layers]
    before: list[Attend] = [layer.attend for layer in layers]
    trains = model.training
    model.eval()
    try:
        for layer, one in zip(layers, kept, strict=True):
            layer.attend = one
        yield kept
    finally:
        for layer, other in zip(layers, before, strict=True):
            layer.attend = other
        model.train(trains)
