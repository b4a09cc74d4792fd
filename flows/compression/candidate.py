"""Loads any model that the chain makes, floating-point or INT8, to the same interface."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flows.compression.int8 import Int8Embedding
from flows.compression.quantized_linear import W8A8Linear
from flows.config.model import Kernels
from flows.model.checkpoint import WEIGHTS, load_decoder
from flows.model.config_json import CONFIG, CheckpointError, read_config, read_json
from flows.model.decoder import Decoder
from flows.model.transformers_model import TransformersModel, is_transformers_kind, load_transformers_model

QUANT_METHOD = "millrace_int8"
"""Marks our INT8 format in config.json; other readers refuse it instead of taking codes for weights."""
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


def load_candidate(directory: Path, kernels: Kernels = Kernels.reference) -> Decoder | TransformersModel:
    """The model in an artifact of the chain, on the CPU, in evaluation mode.

    Args:
        directory: Model directory, floating-point or INT8.
        kernels: Which implementation of the fused operations it runs.

    Raises:
        CheckpointError: A file or weight is missing, unknown, damaged or of another shape.
    """
    quantization = read_json(directory).get("quantization_config")
    if quantization is None and is_transformers_kind(read_json(directory).get("model_type")):
        return load_transformers_model(directory).requires_grad_(False).eval()
    if quantization is None:
        return load_decoder(directory, kernels).requires_grad_(False).eval()
    if quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{directory / CONFIG} has quant_method={quantization.get('quant_method')}, only {QUANT_METHOD} is read. "
            "Quantize the floating-point model that it was made from."
        )
    config, vocab_size = read_config(directory)
    with torch.device("meta"):
        model = Decoder(replace(config, kernels=kernels), vocab_size)
        for name in quantization["modules"]:
            layer = model.get_submodule(name)
            replace_layer(model, name, int8_layer(layer, *_empty_codes(layer), kernels))
    tensors = _read_weights(directory / WEIGHTS)
    if config.tie_word_embeddings:
        shared = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{_EMBEDDING}.")}
        tensors |= {name.replace(_EMBEDDING, _HEAD): tensor for name, tensor in shared.items()}
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # torch lists every name and shape that differs
        raise CheckpointError(f"{directory / WEIGHTS} does not fit its {CONFIG}: {error}") from error
    if isinstance(model.lm_head, nn.Linear):
        model.tie_weights()
    return model.requires_grad_(False).eval()


def unshared_state(model: Decoder) -> dict[str, Tensor]:
    """The model's tensors by name, each matrix once: a tied head is the embedding."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{_HEAD}.")}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def count_parameters(model: Decoder | TransformersModel) -> int:
    """Number of weights, shared ones once; code steps are not counted, so that INT8 does not change the number."""
    if isinstance(model, TransformersModel):
        return sum(parameter.numel() for parameter in model.parameters())
    return sum(tensor.numel() for name, tensor in unshared_state(model).items() if not name.endswith(".weight_scale"))


def int8_layer(
    layer: nn.Module, codes: Tensor, scale: Tensor, kernels: Kernels = Kernels.auto
) -> W8A8Linear | Int8Embedding:
    """The INT8 layer that takes the place of a linear layer or an embedding.

    Args:
        layer: What is replaced.
        codes: Its weights, int8 [N, K].
        scale: Code step of each row, float32 [N].
        kernels: Which implementation a linear layer runs.
    """
    if isinstance(layer, nn.Embedding):
        return Int8Embedding(codes, scale)
    assert isinstance(layer, nn.Linear)
    return W8A8Linear(codes, scale, layer.bias, kernels.value)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` in the place of the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _empty_codes(layer: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(layer.weight, Tensor)
    rows = layer.weight.shape[0]
    return torch.empty(layer.weight.shape, dtype=torch.int8), torch.empty(rows)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Copy the model again.") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy the model again.") from error
