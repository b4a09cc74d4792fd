"""Keys and values of past tokens in 8 bits, INT8 or E4M3, each token and head with its own code step.

A token's keys and values are rounded before anybody looks at them, itself included, so that what a text is answered
does not depend on how its tokens were cut into steps, nor on what shares its pages: the whole text, computed at once
with rounded keys and values, says the same.

Shape letters: B rows, G key and value heads, L tokens, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flows.config.serving import CacheDtype
from flows.model.attention import Attend, Attention, Visible, attend
from flows.model.decoder import Decoder
from kernels.reference import FP8, INT8, dequantize, quantize_groups


def keep_cache_in(cache_dtype: CacheDtype, model: Decoder) -> None:
    """Makes a model compute whole texts as a program does that keeps keys and values in a dtype, in place."""
    for layer in model.model.layers:
        assert isinstance(layer.self_attn, Attention)
        layer.self_attn.attend = ATTEND[cache_dtype]


def rounds_cache(layer: Attention) -> bool:
    """Whether an attention layer looks at keys and values as they come back from 8 bits."""
    return layer.attend in (_attend_int8, _attend_fp8)


def _attend_int8(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, visible: Visible) -> Tensor:
    return attend(q_BHLK, _rounded(k_BGLK, INT8), _rounded(v_BGLK, INT8), visible)


def _attend_fp8(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, visible: Visible) -> Tensor:
    return attend(q_BHLK, _rounded(k_BGLK, FP8), _rounded(v_BGLK, FP8), visible)


ATTEND: dict[CacheDtype, Attend] = {
    CacheDtype.float32: attend,
    CacheDtype.int8: _attend_int8,
    CacheDtype.fp8: _attend_fp8,
}
"""What `flows.model.attention.attend` gives for keys and values as they come back from each dtype."""
CODES: dict[CacheDtype, torch.dtype] = {CacheDtype.int8: INT8, CacheDtype.fp8: FP8}
"""Of the dtypes that are codes."""


def _rounded(x_BGLK: Tensor, dtype: torch.dtype) -> Tensor:
    return decode(*encode(x_BGLK, dtype))


def encode(x_BGLK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [B, G, L, K] of keys or values, and the code step of each token and head [B, G, L, 1]."""
    return quantize_groups(x_BGLK, x_BGLK.shape[-1], dtype)


def decode(codes_BGLK: Tensor, steps_BGL1: Tensor) -> Tensor:
    """What codes, or the numbers that they are, stand for [B, G, L, K]."""
    return dequantize(codes_BGLK, steps_BGL1, steps_BGL1.dtype)
