"""A decoder counted on paper: parameters, FLOPs, and what its forward pass keeps for the way back; needs no torch."""

from __future__ import annotations

from flows.config.model import ModelConfig

FP32_BYTES = 4


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of `flows.model.decoder.Decoder`, a tied output projection counted once."""
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    embedding = 0 if config.tie_word_embeddings else vocab_size * config.hidden_size
    return matrix_parameter_count(config, vocab_size) + norms + embedding


def matrix_parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters that every token is multiplied with: all layers' matrices and the output projection."""
    return config.num_hidden_layers * layer_matrix_count(config) + vocab_size * config.hidden_size


def layer_matrix_count(config: ModelConfig) -> int:
    """Matrix parameters of one layer."""
    attention = 2 * config.hidden_size * (config.hidden_size + config.num_key_value_heads * config.head_dim)
    return attention + 3 * config.hidden_size * config.intermediate_size


def forward_flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> float:
    """FLOPs of one token's forward pass; the way back costs twice as much.

    2 for each matrix parameter (arXiv:2001.08361), and 4 x layers x length x width for attention, counted in full
    although causal kernels skip half of it: the usual definition of model FLOPs (PaLM, arXiv:2204.02311, appendix B).
    """
    attention = 4 * config.num_hidden_layers * sequence_length * config.hidden_size
    return 2.0 * matrix_parameter_count(config, vocab_size) + attention


def layer_activation_bytes(config: ModelConfig, width_bytes: int, fused_norms: bool) -> int:
    """Bytes that one layer keeps of one token for the way back.

    Counted like arXiv:2205.05198, section 4, for this decoder: attention that keeps no scores (arXiv:2205.14135), its
    queries, output, keys, values and one sum per head; four results of the feed-forward width; both norms.

    Args:
        config: The model.
        width_bytes: Of one activation.
        fused_norms: The norm kernel keeps its input and one float32 per token; plain torch keeps two float32 copies.
    """
    kv_width = config.num_key_value_heads * config.head_dim
    attention = width_bytes * (2 * config.hidden_size + 2 * kv_width) + FP32_BYTES * config.num_attention_heads
    feed_forward = 4 * width_bytes * config.intermediate_size
    return attention + feed_forward + 2 * norm_activation_bytes(config, width_bytes, fused_norms)


def norm_activation_bytes(config: ModelConfig, width_bytes: int, fused: bool) -> int:
    """Bytes that one norm keeps of one token, its output included."""
    inside = width_bytes * config.hidden_size if fused else 2 * FP32_BYTES * config.hidden_size
    return inside + FP32_BYTES + width_bytes * config.hidden_size
