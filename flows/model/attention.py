# Shape letters are upper case; calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""Causal self-attention with rotary positions; several query heads may share a key and value head.

Shape letters: B batch, L length, D hidden size, H query heads, G key and value heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flows.config.model import ModelConfig
from flows.model.norm import RMSNorm
from kernels.document_attention import DocumentBounds, attends_by_kernel, document_attention, document_bounds
from kernels.rotary import rotary

Visible = Tensor | DocumentBounds | None
"""Which keys each query may look at: those allowed [B, 1, L, L], those of its document up to itself, all up to itself.
"""
Attend = Callable[[Tensor, Tensor, Tensor, Visible], Tensor]
"""What `attend` does, perhaps together with other ranks."""


def attend(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, visible: Visible) -> Tensor:
    """Mean of the values of visible keys, weighted by softmax(q k / sqrt(K)) [B, H, L, K].

    Args:
        q_BHLK: Queries.
        k_BGLK: Keys; each of their G heads serves H / G query heads.
        v_BGLK: Values.
        visible: Which keys each query may look at.
    """
    if not isinstance(visible, Tensor):
        return document_attention(q_BHLK, k_BGLK, v_BGLK, visible)
    grouped = q_BHLK.shape[1] != k_BGLK.shape[1]
    return scaled_dot_product_attention(q_BHLK, k_BGLK, v_BGLK, visible, enable_gqa=grouped)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; groups of query heads share a key and value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attend: Attend = attend
        self.kernels = config.kernels.value
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x_BLD: Tensor, rotation: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        """What each position gathers from those it may look at [B, L, D]."""
        split = (*x_BLD.shape[:2], -1, self.head_dim)
        q_BHLK = self.q_norm(self.q_proj(x_BLD).view(split)).transpose(1, 2)
        k_BGLK = self.k_norm(self.k_proj(x_BLD).view(split)).transpose(1, 2)
        q_BHLK, k_BGLK = rotary(q_BHLK, k_BGLK, *rotation, self.kernels)
        v_BGLK = self.v_proj(x_BLD).view(split).transpose(1, 2)
        y_BHLK = self.attend(q_BHLK, k_BGLK, v_BGLK, visible)
        return self.o_proj(y_BHLK.transpose(1, 2).flatten(2))


def visible_keys(
    x_BLD: Tensor,
    head_dim: int,
    kernels: str,
    attention_mask_BL: Tensor | None = None,
    document_ids_BL: Tensor | None = None,
) -> Visible:
    """What each query may look at, made once for all layers: for the kernel no mask of all pairs, only documents' ends.

    Args:
        x_BLD: Residual stream: its dtype and device decide whether a kernel can run.
        head_dim: Width of an attention head.
        kernels: `auto`, `triton` or `reference`. Padding has no kernel: the library's attention masks it.
        attention_mask_BL: 1 for real tokens, 0 for padding.
        document_ids_BL: Number of the document that each token belongs to.

    Raises:
        KernelError: `triton` is asked for and impossible.
    """
    if document_ids_BL is None or attention_mask_BL is not None or not attends_by_kernel(kernels, x_BLD, head_dim):
        return allowed_keys(attention_mask_BL, document_ids_BL)
    return document_bounds(document_ids_BL)


def allowed_keys(attention_mask_BL: Tensor | None, document_ids_BL: Tensor | None = None) -> Tensor | None:
    """Which keys each query may look at, bool [B, 1, L, L]: real ones of its document, up to itself; None = all.

    Every query may look at itself, padding too: a row with nothing to look at would be a softmax over nothing, NaN.
    """
    given_BL = attention_mask_BL if attention_mask_BL is not None else document_ids_BL
    if given_BL is None:
        return None
    order_L = torch.arange(given_BL.shape[1], device=given_BL.device)
    allowed_BLL = (order_L[:, None] >= order_L[None, :])[None]
    if document_ids_BL is not None:
        allowed_BLL = allowed_BLL & (document_ids_BL[:, :, None] == document_ids_BL[:, None, :])
    if attention_mask_BL is not None:
        itself_LL = order_L[:, None] == order_L[None, :]
        allowed_BLL = (attention_mask_BL[:, None, :] != 0) & allowed_BLL | itself_LL
    return allowed_BLL[:, None]


def last_places(attention_mask: Tensor) -> Tensor:
    """Position of the last real token of each row [batch]; mask [batch, length], padding on either side."""
    order = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return (attention_mask * order).argmax(1)


def positions(
    input_ids_BL: Tensor, attention_mask_BL: Tensor | None, document_ids_BL: Tensor | None, first: int = 0
) -> Tensor:
    """Position of each token in its document, int64 [B or 1, L]; padding is not counted.

    Args:
        input_ids_BL: Tokens; where other ranks have other parts of the sequences, those from `first` on.
        attention_mask_BL: 0 for padding, of the whole sequences; None = there is none.
        document_ids_BL: Document of each token of the whole sequences; None = one for all.
        first: Place of the first token in the sequence.
    """
    length = input_ids_BL.shape[1]
    if document_ids_BL is None:
        if attention_mask_BL is None:
            return torch.arange(first, first + length, device=input_ids_BL.device)[None]
        return (attention_mask_BL.cumsum(1) - 1).clamp(min=0)[:, first : first + length]
    counted_BL = torch.ones_like(document_ids_BL) if attention_mask_BL is None else attention_mask_BL
    before_BL = counted_BL.cumsum(1) - counted_BL
    begins_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    begins_BL[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    return (before_BL - before_BL.where(begins_BL, 0).cummax(1).values)[:, first : first + length]


def angles(positions_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, L, K] of each position's angles, Hugging Face's order: all first halves, then all second.

    From positions, not from a table, so that no length is too long; in float32 whatever the model's dtype.
    """
    pair_K = torch.arange(0, head_dim, 2, device=positions_BL.device).float() / head_dim
    angles_BLK = positions_BL[..., None].float() * (1.0 / theta**pair_K)
    angles_B1LK = torch.cat((angles_BLK, angles_BLK), dim=-1)[:, None]
    return angles_B1LK.cos(), angles_B1LK.sin()
