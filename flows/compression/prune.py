"""Stage: a model without the parts that matter least, measured on calibration data, as a model like any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flows.artifact import Artifact, write_json_atomically
from flows.compression.calibration import draw_calibration
from flows.compression.importance import Importance, mean_loss, measure_importance
from flows.compression.prune_parts import Kept, choose_parts, keep_parts, norm_scales
from flows.compression.prune_weights import LayerSparsity, prune_weights_
from flows.config.model import ModelConfig
from flows.config.prune import PruneConfig, PruningConfig, pruned_shape
from flows.data.tokenizer import copy_tokenizer
from flows.model.arithmetic import parameter_count
from flows.model.checkpoint import WEIGHTS, load_decoder, save_decoder
from flows.model.config_json import read_json
from flows.model.decoder import Decoder

PRUNING = "pruning.json"
"""Which sequences importance was measured on, and which parts were kept, by their numbers in the source."""
PLOTTED = 200
"""Scores of a layer that the report draws; a wider layer is thinned out."""


def build(directory: Path, config: PruningConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes config.json, model.safetensors, tokenizer.json and pruning.json; runs on a GPU where there is one.

    Args:
        directory: Where the files go.
        config: What is kept, and how importance is measured.
        parents: `model`: a floating-point decoder; `tokens`.

    Returns:
        `source_parameters`, `parameters`, `bytes` and `source_bytes` of the weights files, `shape` (before and after by
        setting), `importance` (scores to draw), `layers` (sparsity of each matrix), `calibration`, `source_loss` and
        `loss` on it.
    """
    source_dir = parents["model"].path
    model = load_decoder(source_dir).requires_grad_(False).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    shape = pruned_shape(model.config, config.prune, parents["model"].stage)
    calibration = draw_calibration(parents["tokens"].path, config)
    importance = measure_importance(model, calibration, config.prune.layer_importance)
    kept, small, sparsity = None, model, tuple[LayerSparsity, ...]()
    if config.prune.is_structured:
        kept = choose_parts(importance, model.config, shape, config.prune.layers)
        small = smaller_decoder(model, kept, shape, importance)
    else:
        sparsity = prune_weights_(small, config.prune, importance.input_squares)
    found = read_json(source_dir)
    state = small.cpu().state_dict()
    save_decoder(directory, state, shape, small.vocab_size, found["max_position_embeddings"], found["eos_token_id"])
    copy_tokenizer(source_dir, directory)
    chosen = {"sequences": calibration.indices.tolist(), "kept": None if kept is None else asdict(kept)}
    write_json_atomically(directory / PRUNING, chosen)
    return {
        "source_parameters": parameter_count(model.config, model.vocab_size),
        "parameters": parameter_count(shape, small.vocab_size),
        "shape": _changes(model.config, shape),
        "importance": _drawn(importance, kept, config.prune),
        "layers": [asdict(layer) for layer in sparsity],
        "bytes": (directory / WEIGHTS).stat().st_size,
        "source_bytes": sum(path.stat().st_size for path in source_dir.glob("*.safetensors")),
        "calibration": calibration.to_metrics(),
        "source_loss": importance.loss,
        "loss": mean_loss(small, calibration),
    }


def smaller_decoder(model: Decoder, kept: Kept, shape: ModelConfig, importance: Importance) -> Decoder:
    """The decoder that the parts that stay make, where the model is.

    Args:
        model: The whole one.
        kept: Which of its parts stay.
        shape: What they make; `kernels` is the model's own.
        importance: Of the parts, for the norms to make up for channels that go.
    """
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    scales = norm_scales(importance, state, kept)
    small = Decoder(replace(shape, kernels=model.config.kernels), model.vocab_size)
    small.load_state_dict(keep_parts(state, kept, model.config.head_dim, scales))
    return small.requires_grad_(False).eval().to(model.lm_head.weight.device)


def _changes(source: ModelConfig, shape: ModelConfig) -> dict[str, tuple[int, int]]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {name: (getattr(source, name), getattr(shape, name)) for name in names}


def _drawn(importance: Importance, kept: Kept | None, config: PruneConfig) -> dict[str, Any]:
    """Scores for the report: of each layer, and of widths from the largest down, as shares of the largest."""
    widths = {"neurons": importance.neurons, "heads": importance.heads, "channels": [importance.channels]}
    return {
        "layers": importance.layers.tolist(),
        "layers_by": config.layer_importance,
        "kept_layers": None if kept is None else kept.layers,
        "widths": {name: [_ranked(scores) for scores in some] for name, some in widths.items()},
    }


def _ranked(scores: Tensor) -> list[float]:
    ranked = (scores / scores.max()).sort(descending=True).values
    places = torch.linspace(0, len(ranked) - 1, min(PLOTTED, len(ranked))).round().long()
    return [round(float(score), 4) for score in ranked[places]]
