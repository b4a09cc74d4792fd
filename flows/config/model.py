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


class Family(StrEnum):
    """What a model is asked: the token that follows, those that are hidden, or what a text is."""

    causal_lm = "causal_lm"
    masked_lm = "masked_lm"
    sequence_classification = "sequence_classification"


class Architecture(StrEnum):
    """Whose code computes the model."""

    decoder = "decoder"
    transformers = "transformers"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-class decoder; the vocabulary comes from the tokenizer."""

    architecture: Architecture = Architecture.decoder
    """`decoder`: ours; `transformers`: the language model in `initial_weights` as that library computes it. Its shape
    is its own then: the settings of the shape below are not read. Without `initial_weights`, and to classify texts
    only, it is a new BERT of width, layers and heads as below."""
    family: Family = Family.causal_lm
    """`causal_lm`: predicts the next token; `masked_lm`: fills in hidden tokens (encoders such as BERT,
    arXiv:1810.04805); `sequence_classification`: says which of several labels a text has (encoders and decoders). The
    latter two are trained, measured, exported and saved, but not published."""
    hidden_size: int = 256
    """Width of the residual stream, which every layer reads and adds to."""
    intermediate_size: int = 704
    """Width of the SwiGLU feed-forward layer: 8/3 of the hidden size (arXiv:2302.13971), up to a multiple of 32."""
    num_hidden_layers: int = 4
    """Layers of attention and feed-forward."""
    num_attention_heads: int = 4
    """Query heads of each layer."""
    num_key_value_heads: int = 2
    """Key and value heads, shared by groups of query heads (grouped-query attention, arXiv:2305.13245)."""
    attention_head_dim: int | None = None
    """Width of one attention head; null = hidden_size / num_attention_heads."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias, as in Qwen2 (arXiv:2407.10671)."""
    qk_norm: bool = False
    """Queries and keys are normalized in each head, as in Qwen3 (arXiv:2505.09388)."""
    num_experts: int = 0
    """Feed-forward layers of which each token passes through a few (arXiv:2401.04088); 0 = one for all."""
    num_experts_per_tok: int = 2
    """Experts that each token passes through; read only with `num_experts`."""
    router_aux_loss_coef: float = 0.001
    """Weight of the loss that keeps experts equally busy (arXiv:2101.03961); Mixtral's. Part of the training loss."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies (arXiv:2104.09864)."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square that a norm divides by."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = True
    """The output projection is the embedding matrix."""
    kernels: Kernels = Kernels.auto
    """Of the model's operations and AdamW's update. `auto`: Triton-language kernels on CUDA, else plain torch;
    `triton`: kernels or an error; `reference`: torch."""
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
        require(
            self.architecture == Architecture.decoder or self.initial_weights is not None or self.is_new_encoder,
            "model.architecture",
            self.architecture,
            "needs a model to start from, and model.initial_weights is null",
            "Set model.initial_weights to a Hugging Face directory, or model.architecture=decoder.",
        )
        require(
            self.family == Family.causal_lm or self.architecture == Architecture.transformers,
            "model.family",
            self.family,
            f"cannot be combined with model.architecture={self.architecture}, which predicts what follows",
            "Set model.architecture=transformers, or model.family=causal_lm.",
        )
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

        require(
            self.num_experts == 0 or 2 <= self.num_experts_per_tok <= self.num_experts,
            "model.num_experts_per_tok",
            self.num_experts_per_tok,
            f"must lie between 2 and model.num_experts={self.num_experts}: with one expert the gate learns nothing",
            "Set model.num_experts_per_tok=2, or model.num_experts=0.",
        )
        require(
            self.num_experts == 0 or not (self.qkv_bias or self.qk_norm),
            "model.num_experts",
            self.num_experts,
            "cannot be combined with model.qkv_bias or model.qk_norm: no model of the transformers library has both",
            "Set model.num_experts=0, or both others false.",
        )
        require(
            self.router_aux_loss_coef >= 0,
            "model.router_aux_loss_coef",
            self.router_aux_loss_coef,
            "must not be negative",
            "Set it to 0 to turn it off.",
        )

    @property
    def is_new_encoder(self) -> bool:
        """Whether it is a BERT of this shape (arXiv:1810.04805), from random weights: its heads share no keys."""
        return self.family == Family.sequence_classification and self.initial_weights is None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads
