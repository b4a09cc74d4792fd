"""A decoder's shape as Hugging Face writes it: config.json of a Llama-class model, Qwen2 and Qwen3 among them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.config import ConfigError, RunError
from flows.config.model import Architecture, Family, ModelConfig

CONFIG = "config.json"
_ASSUMED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
"""What our decoder computes where Hugging Face's leaves a choice; also what a missing key means."""
_ASSUMED_OF_MIXTRAL = {"hidden_act": "silu", "sliding_window": None}
_ASSUMED_OF_QWEN = {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


_FEED_FORWARD_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
_GATED = ("gemma", "modernbert", "olmo2", "phi3", "smollm3")
"""Kinds of transformers' models whose feed-forward layer has three matrices."""


class CheckpointError(RunError):
    """A model directory is missing, damaged, or not of the kind that our decoder computes."""


def hugging_face_config(
    config: ModelConfig, vocab_size: int, max_position_embeddings: int, eos_token_id: int, dtype: str
) -> dict[str, Any]:
    """What config.json says about a decoder, as transformers' AutoModelForCausalLM reads it.

    Args:
        config: Shape of the decoder.
        vocab_size: Number of tokens.
        max_position_embeddings: Longest sequence in training, in tokens; the decoder itself has no limit.
        eos_token_id: Token that ends a document.
        dtype: Number format of the weights, e.g. "float32".
    """
    model_type = (
        "mixtral" if config.num_experts else "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    )
    mixture = {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }
    return {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        **(mixture if config.num_experts else {}),
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": max_position_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
        **_assumed(model_type),
    }


def _assumed(model_type: str) -> dict[str, Any]:
    known: dict[str, dict[str, Any]] = {"llama": _ASSUMED, "mixtral": _ASSUMED_OF_MIXTRAL}
    return known.get(model_type, _ASSUMED_OF_QWEN)


def read_json(directory: Path) -> dict[str, Any]:
    """All of a model directory's config.json.

    Raises:
        CheckpointError: It is missing or not JSON.
    """
    path = directory / CONFIG
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Name a Hugging Face model directory, which holds it.") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not readable as a JSON object: {error}. Copy the model again.") from error


def read_config(directory: Path) -> tuple[ModelConfig, int]:
    """Shape and vocabulary size of the Llama-class model in a directory, from its config.json alone.

    Raises:
        CheckpointError: It is missing, incomplete, or describes what our decoder does not compute.
    """
    path, found = directory / CONFIG, read_json(directory)
    _refuse_other_architectures(path, found)
    try:
        heads = found["num_attention_heads"]
        config = ModelConfig(
            hidden_size=found["hidden_size"],
            intermediate_size=found["intermediate_size"],
            num_hidden_layers=found["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=found.get("num_key_value_heads") or heads,
            attention_head_dim=_own_head_dim(found),
            qkv_bias=found["model_type"] == "qwen2",
            qk_norm=found["model_type"] == "qwen3",
            rope_theta=float(_rope(found).get("rope_theta", 10_000.0)),
            rms_norm_eps=found.get("rms_norm_eps", 1e-6),
            initializer_range=found.get("initializer_range", 0.02),
            tie_word_embeddings=found.get("tie_word_embeddings", False),
            **_mixture(found),
        )
        vocab_size = int(found["vocab_size"])
    except KeyError as error:
        raise CheckpointError(f"{path} has no field {error.args[0]!r}. Copy the model again.") from error
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} describes no decoder of ours: {error}") from error
    return config, vocab_size


def _mixture(found: dict[str, Any]) -> dict[str, Any]:
    if found["model_type"] != "mixtral":
        return {}
    return {
        "num_experts": found["num_local_experts"],
        "num_experts_per_tok": found.get("num_experts_per_tok", 2),
        "router_aux_loss_coef": found.get("router_aux_loss_coef", 0.001),
    }


def counted_shape(config: ModelConfig) -> ModelConfig:
    """The decoder of ours that plans count in place of a model: itself, or one as large as transformers' model.

    Biases and learned positions are left out: below a hundredth at the sizes that plans are made for.

    Raises:
        CheckpointError: config.json is missing or has no such shape.
    """
    if config.architecture == Architecture.decoder:
        return config
    if config.initial_weights is None:  # a new BERT
        return replace(
            config,
            architecture=Architecture.decoder,
            family=Family.causal_lm,
            intermediate_size=round(config.intermediate_size * 2 / 3),
            num_key_value_heads=config.num_attention_heads,
        )
    path, found = config.initial_weights / CONFIG, read_json(config.initial_weights)

    def number(*names: str) -> int:
        for name in names:
            if found.get(name):
                return int(found[name])
        raise CheckpointError(f"{path} has none of {', '.join(names)}. Copy the model again.")

    hidden, heads = number("hidden_size", "n_embd", "dim"), number("num_attention_heads", "n_head", "n_heads")
    four_times = {**found, "default": 4 * hidden}
    inner = next(int(four_times[name]) for name in (*_FEED_FORWARD_WIDTHS, "default") if four_times.get(name))
    gated = found.get("model_type") in _GATED
    return replace(
        config,
        architecture=Architecture.decoder,
        family=Family.causal_lm,
        hidden_size=hidden,
        intermediate_size=inner if gated else round(inner * 2 / 3),  # two matrices, where ours has three
        num_hidden_layers=number("num_hidden_layers", "n_layer", "n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=int(found.get("num_key_value_heads") or heads),
        attention_head_dim=int(found["head_dim"]) if found.get("head_dim") else None,
        tie_word_embeddings=bool(found.get("tie_word_embeddings", True)),
    )


def _own_head_dim(found: dict[str, Any]) -> int | None:
    """Width of a head where it does not follow from the hidden size; Qwen3's is 128 where config.json is silent."""
    follows = found["hidden_size"] / found["num_attention_heads"]
    head_dim = found.get("head_dim") or (128 if found["model_type"] == "qwen3" else follows)
    return None if head_dim == follows else int(head_dim)


def _rope(found: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, where transformers 5 writes them (`rope_parameters`) or where earlier ones do."""
    earlier = {"rope_theta": found["rope_theta"]} if "rope_theta" in found else {}
    return {**earlier, **(found.get("rope_scaling") or {}), **(found.get("rope_parameters") or {})}


def _refuse_other_architectures(path: Path, found: dict[str, Any]) -> None:
    model_type = found.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise CheckpointError(_unsupported(path, "model_type", model_type, ", ".join(_ARCHITECTURES)))
    for field, assumed in _assumed(model_type).items():
        value = found.get(field, assumed)
        if value != assumed:
            raise CheckpointError(_unsupported(path, field, value, assumed))
    rope = _rope(found)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise CheckpointError(_unsupported(path, "rope_type", rope_type, "default"))


def _unsupported(path: Path, field: str, value: object, expected: object) -> str:
    rule = f"{path} has {field}={value}, and our decoder computes {field}={expected} only"
    return f"{rule}. Use such a model; model.architecture=transformers takes others as they are."
