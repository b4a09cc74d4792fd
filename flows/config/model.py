"""Shape of the decoder, in Hugging Face's terms."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from flows.config.checks import require, require_positive


class Kernels(StrEnum):
    """Which implementation of the fused operations a model runs."""

    auto = "auto"
    triton = "triton"
    reference = "reference"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-class decoder; the vocabulary comes from the tokenizer."""

    hidden_size: int = 256
    intermediate_size: int = 688
    """Width of the SwiGLU feed-forward layer."""
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    """Key and value heads, shared by groups of query heads (grouped-query attention, arXiv:2305.13245)."""
    attention_head_dim: int | None = None
    """Width of one attention head; null = hidden_size / num_attention_heads."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias, as in Qwen2 (arXiv:2407.10671)."""
    qk_norm: bool = False
    """Queries and keys are normalized in each head, as in Qwen3 (arXiv:2505.09388)."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies (arXiv:2104.09864)."""
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = True
    """The output projection is the embedding matrix."""
    kernels: Kernels = Kernels.auto
    """`auto`: Triton-language kernels on CUDA, else plain torch; `triton`: kernels or an error; `reference`: torch."""
    initial_weights: Path | None = None
    """Hugging Face directory (config.json, model.safetensors) of the same shape to start from: Llama, Qwen2, Qwen3 or
    one of ours; null = random."""

    def __post_init__(self) -> None:
        require_positive(
            "model",
            self,
            ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"],
        )
        require_positive("model", self, ["rope_theta", "rms_norm_eps", "initializer_range"])
        pairs = 2 * self.num_attention_heads
        require(
            self.attention_head_dim is not None or self.hidden_size % pairs == 0,
            "model.hidden_size",
            self.hidden_size,
            f"must be a multiple of 2 x model.num_attention_heads={self.num_attention_heads}: positions turn pairs",
            f"Set model.hidden_size={pairs * max(1, self.hidden_size // pairs)}.",
        )
        require(
            self.attention_head_dim is None or (self.attention_head_dim > 0 and self.attention_head_dim % 2 == 0),
            "model.attention_head_dim",
            self.attention_head_dim,
            "must be an even number above 0: positions turn pairs",
            "Set model.attention_head_dim=64, or null.",
        )
        require(
            not (self.qkv_bias and self.qk_norm),
            "model.qk_norm",
            self.qk_norm,
            "cannot be combined with model.qkv_bias=True: no model of that kind could be read back by others",
            "Set model.qkv_bias=false as Qwen3 does, or model.qk_norm=false as Qwen2 does.",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"must divide model.num_attention_heads={self.num_attention_heads}",
            "Set model.num_key_value_heads=1, or one of its divisors.",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads
