"""A decoder counted on paper: parameters, FLOPs, and what its forward pass keeps for the way back; needs no torch."""

from __future__ import annotations

import math

from flows.config.model import ModelConfig

FP32_BYTES = 4


def weight_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of `flows.model.decoder.Decoder`, by its name; a tied output projection is left out."""
    width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    widths = {
        "q_proj": heads * config.head_dim,
        "k_proj": kv_heads * config.head_dim,
        "v_proj": kv_heads * config.head_dim,
    }
    layer: dict[str, tuple[int, ...]] = {}
    for name, out in widths.items():
        layer[f"self_attn.{name}.weight"] = (out, width)
        if config.qkv_bias:
            layer[f"self_attn.{name}.bias"] = (out,)
    layer["self_attn.o_proj.weight"] = (width, widths["q_proj"])
    if config.qk_norm:
        layer |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    for number in range(config.num_experts):
        expert = f"block_sparse_moe.experts.{number}"
        layer[f"{expert}.w1.weight"] = layer[f"{expert}.w3.weight"] = (config.intermediate_size, width)
        layer[f"{expert}.w2.weight"] = (width, config.intermediate_size)
    if config.num_experts:
        layer["block_sparse_moe.gate.weight"] = (config.num_experts, width)
    else:
        layer["mlp.gate_proj.weight"] = layer["mlp.up_proj.weight"] = (config.intermediate_size, width)
        layer["mlp.down_proj.weight"] = (width, config.intermediate_size)
    layer |= {f"{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, width)}
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab_size, width)
    return shapes


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of the decoder, a tied output projection counted once."""
    return sum(math.prod(shape) for shape in weight_shapes(config, vocab_size).values())


def matrix_parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters that a token is multiplied with: matrices of all layers, of its own experts, and for the scores."""
    layer = layer_matrix_count(config, config.num_experts_per_tok if config.num_experts else 1)
    return config.num_hidden_layers * layer + vocab_size * config.hidden_size


def layer_matrix_count(config: ModelConfig, experts: int | None = None) -> int:
    """Matrix parameters of one layer with as many experts, or with all that it has."""
    if experts is None:
        experts = max(1, config.num_experts)
    attention = 2 * config.hidden_size * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    gate = config.hidden_size * config.num_experts
    return attention + gate + experts * 3 * config.hidden_size * config.intermediate_size


def forward_flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> float:
    """FLOPs of one token's forward pass; the way back costs twice as much.

    2 for each matrix parameter (arXiv:2001.08361), and 4 x layers x length x width of all heads for attention, counted
    in full although causal kernels skip half of it: the usual definition of model FLOPs (PaLM, arXiv:2204.02311,
    appendix B).
    """
    attention = 4 * config.num_hidden_layers * sequence_length * config.num_attention_heads * config.head_dim
    return 2.0 * matrix_parameter_count(config, vocab_size) + attention


def layer_activation_bytes(config: ModelConfig, width_bytes: int, fused: bool) -> int:
    """Bytes that one layer keeps of one token for the way back.

    Counted like arXiv:2205.05198, section 4, for this decoder: attention that keeps no scores (arXiv:2205.14135), its
    queries, output, keys, values and one sum per head; four results of the feed-forward width; both norms, and those
    of queries and keys where there are any.

    Args:
        config: The model.
        width_bytes: Of one activation.
        fused: Norm kernels keep their input and one float32 per row, where plain torch keeps two float32 copies; the
            SwiGLU kernel computes one of the four results again.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = width_bytes * 2 * (heads + kv_heads) * config.head_dim + FP32_BYTES * heads
    if config.qk_norm:
        attention += (heads + kv_heads) * (_inside_norm(config.head_dim, width_bytes, fused) + FP32_BYTES)
    experts = config.num_experts_per_tok if config.num_experts else 1
    feed_forward = (3 if fused else 4) * width_bytes * config.intermediate_size * experts
    return attention + feed_forward + 2 * norm_activation_bytes(config, width_bytes, fused)


def norm_activation_bytes(config: ModelConfig, width_bytes: int, fused: bool) -> int:
    """Bytes that one norm of the residual stream keeps of one token, its output included."""
    return _inside_norm(config.hidden_size, width_bytes, fused) + FP32_BYTES + width_bytes * config.hidden_size


def _inside_norm(width: int, width_bytes: int, fused: bool) -> int:
    return width_bytes * width if fused else 2 * FP32_BYTES * width
