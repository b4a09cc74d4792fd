"""Loads any model that the chain makes, floating-point or quantized, to the same interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flows.compression.coded_matrix import Coded, make_layer, share_codes
from flows.compression.compressed_tensors_layout import (
    QUANT_METHOD,
    STORED,
    LayoutError,
    read_coded,
    read_schemes,
    stored_tensors,
)
from flows.config.model import Kernels
from flows.model.arithmetic import parameter_count
from flows.model.checkpoint import WEIGHTS, is_floating_point, load_decoder
from flows.model.config_json import CONFIG, CheckpointError, read_config, read_json
from flows.model.decoder import Decoder
from flows.model.transformers_model import TransformersModel, load_transformers_model, own_family

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def load_candidate(directory: Path, kernels: Kernels = Kernels.reference) -> Decoder | TransformersModel:
    """The model in an artifact of the chain, on the CPU, in evaluation mode.

    Args:
        directory: Model directory, floating-point or quantized.
        kernels: Which implementation of the fused operations it runs.

    Raises:
        CheckpointError: A file or weight is missing, unknown, damaged or of another shape.
    """
    quantization: Any = read_json(directory).get("quantization_config")
    if quantization is None and own_family(read_json(directory)) is not None:
        return load_transformers_model(directory).requires_grad_(False).eval()
    if is_floating_point(directory):
        return load_decoder(directory, kernels).requires_grad_(False).eval()
    if quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{directory / CONFIG} has quant_method={quantization.get('quant_method')}, only {QUANT_METHOD} is read. "
            "Quantize the floating-point model that it was made from."
        )
    return _load_quantized(directory, quantization, kernels).requires_grad_(False).eval()


def _load_quantized(directory: Path, quantization: Mapping[str, Any], kernels: Kernels) -> Decoder:
    config, vocab_size = read_config(directory)
    with torch.device("meta"):
        model = Decoder(replace(config, kernels=kernels), vocab_size)
    tensors = _read_weights(directory / WEIGHTS)
    try:
        schemes = read_schemes(quantization, matrices(model))
    except (LayoutError, KeyError) as error:
        raise CheckpointError(f"{directory / CONFIG} has a quantization_config that we do not read: {error}") from error
    codes: dict[str, Tensor] = {}
    for name, scheme in schemes.items():
        layer, stored = model.get_submodule(name), name
        if name == HEAD and config.tie_word_embeddings:
            stored = EMBEDDING
            tensors |= {
                f"{EMBEDDING}.{end}": tensors.pop(f"{HEAD}.{end}") for end in STORED if f"{HEAD}.{end}" in tensors
            }
        parts = {end: tensors[f"{stored}.{end}"] for end in STORED if f"{stored}.{end}" in tensors}
        try:
            quantized = make_layer(layer, read_coded(parts, scheme, layer), kernels)
        except (LayoutError, KeyError) as error:
            what = f"{stored}.{error.args[0]} is missing" if isinstance(error, KeyError) else f"{stored}: {error}"
            raise CheckpointError(f"{directory / WEIGHTS} does not fit its {CONFIG}: {what}.") from error
        replace_layer(model, name, quantized)
        codes |= {f"{name}.{end}": tensor for end, tensor in quantized.state_dict().items() if end != "bias"}
    read = {f"{name}.{end}" for name in schemes for end in STORED}
    state = {name: tensor.float() for name, tensor in tensors.items() if name not in read} | codes
    if config.tie_word_embeddings and HEAD not in schemes and f"{EMBEDDING}.weight" in state:
        state[f"{HEAD}.weight"] = state[f"{EMBEDDING}.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # torch lists every name and shape that differs
        raise CheckpointError(f"{directory / WEIGHTS} does not fit its {CONFIG}: {error}") from error
    if config.tie_word_embeddings:
        share_codes(model, EMBEDDING, HEAD) if HEAD in schemes else model.tie_weights()
    return model


def quantized_state(model: Decoder, coded: Mapping[str, Coded]) -> dict[str, Tensor]:
    """The tensors of a quantized model as its file holds them, each matrix once: a tied head is the embedding.

    Args:
        model: With quantized layers in their places.
        coded: Their matrices by name.
    """
    tied = model.config.tie_word_embeddings
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in coded or name.endswith(".bias")
    }
    if tied and HEAD not in coded:
        del state[f"{HEAD}.weight"]
    for name, matrix in coded.items():
        stored = stored_tensors(matrix)
        kept = ("input_scale",) if tied and name == HEAD else STORED
        state |= {f"{name}.{end}": tensor for end, tensor in stored.items() if end in kept}
    return state


def matrices(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """Linear layers and embeddings in floating point, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)}


def count_parameters(model: Decoder | TransformersModel) -> int:
    """Number of weights, shared ones once; what codes need besides is not counted, so that it does not change."""
    if isinstance(model, TransformersModel):
        return sum(parameter.numel() for parameter in model.parameters())
    return parameter_count(model.config, model.vocab_size)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` in the place of the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Copy the model again.") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy the model again.") from error
