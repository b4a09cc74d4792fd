"""Keys and values of past tokens in INT8, each token and head with its own code step.

A token's keys and values are rounded before anybody looks at them, itself included, so that what a text is answered
does not depend on how its tokens were cut into steps, nor on what shares its pages: the whole text, computed at once
with rounded keys and values, says the same.

Shape letters: B rows, G key and value heads, L tokens, K width of a head.
"""

from __future__ import annotations

from torch import Tensor

from flows.model.attention import Attention, Visible, attend
from flows.model.decoder import Decoder
from kernels.reference import INT8, dequantize, quantize_groups


def keep_cache_in_int8(model: Decoder) -> None:
    """Makes a model compute whole texts as a program does that keeps keys and values in INT8, in place."""
    for layer in model.model.layers:
        assert isinstance(layer.self_attn, Attention)
        layer.self_attn.attend = attend_rounded


def attend_rounded(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, visible: Visible) -> Tensor:
    """What `flows.model.attention.attend` gives for keys and values as they come back from INT8."""
    return attend(q_BHLK, decode(*encode(k_BGLK)), decode(*encode(v_BGLK)), visible)


def encode(x_BGLK: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes [B, G, L, K] of keys or values, and the code step of each token and head [B, G, L, 1]."""
    return quantize_groups(x_BGLK, x_BGLK.shape[-1], INT8)


def decode(codes_BGLK: Tensor, steps_BGL1: Tensor) -> Tensor:
    """What codes stand for [B, G, L, K]."""
    return dequantize(codes_BGLK, steps_BGL1, steps_BGL1.dtype)
