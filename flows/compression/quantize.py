"""Stage: a model's linear layers and embedding to INT8, really stored, with a report of every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flows.artifact import Artifact, write_json_atomically
from flows.compression.candidate import QUANT_METHOD, int8_layer, load_candidate, replace_layer, unshared_state
from flows.compression.int8 import MAX_COLUMNS, choose_scale, dequantize, quantize, sqnr_db
from flows.config.checks import require
from flows.config.compression import QuantizeConfig
from flows.data.tokenizer import copy_tokenizer
from flows.model.checkpoint import WEIGHTS
from flows.model.config_json import CONFIG, read_json
from flows.model.decoder import Decoder


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    name: str
    shape: tuple[int, ...]
    sqnr_db: float
    """Of the weights in INT8, whether or not they were kept."""
    skipped_reason: str | None
    """Why the layer stays in floating point; None = it is INT8."""


@dataclass(frozen=True)
class QuantizeReport:
    """Every linear layer and embedding of a model."""

    layers: tuple[LayerReport, ...]

    @property
    def quantized(self) -> list[str]:
        """Names of the layers that are INT8 now."""
        return [layer.name for layer in self.layers if layer.skipped_reason is None]


@torch.no_grad()
def quantize_(model: nn.Module, config: QuantizeConfig) -> QuantizeReport:
    """Replaces linear layers and embeddings by INT8 ones, in place; layers that share a matrix are treated as one.

    Returns:
        A row for every such layer, skipped ones with their reason.

    Raises:
        ConfigError: A pattern of `quantize.skip_modules` matches no layer, or no layer is left to quantize.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)}
    for pattern in config.skip_modules:
        require(
            any(fnmatch(name, pattern) for name in layers),
            "quantize.skip_modules",
            pattern,
            f"matches none of the model's {len(layers)} layers, which have names such as {sorted(layers)[0]}",
            "Set a pattern such as *.down_proj.",
        )
    sharing = defaultdict(list)
    for name, layer in layers.items():
        sharing[id(layer.weight)].append(name)
    rows = {}
    for names in sharing.values():
        weight = layers[names[0]].weight
        scale = choose_scale(weight)
        codes = quantize(weight, scale)
        ratio = sqnr_db(weight, dequantize(codes, scale))
        reason = _reason_to_skip(names, weight, ratio, config)
        for name in names:
            rows[name] = LayerReport(name, tuple(weight.shape), round(ratio, 2), reason)
            if reason is None:
                replace_layer(model, name, int8_layer(layers[name], codes, scale.squeeze(-1)))
    report = QuantizeReport(tuple(rows[name] for name in layers))
    require(
        bool(report.quantized),
        "quantize.skip_modules",
        list(config.skip_modules),
        f"and quantize.min_sqnr_db={config.min_sqnr_db:g} leave none of {len(layers)} layers to quantize",
        "Skip fewer layers, or leave the step out.",
    )
    return report


def _reason_to_skip(names: list[str], weight: Tensor, ratio: float, config: QuantizeConfig) -> str | None:
    for pattern in config.skip_modules:
        for name in names:
            if fnmatch(name, pattern):
                return f"{name} matches quantize.skip_modules={pattern}"
    if ratio < config.min_sqnr_db:
        return f"its weights keep {ratio:.1f} dB, less than quantize.min_sqnr_db={config.min_sqnr_db:g}"
    if weight.shape[1] > MAX_COLUMNS:
        return f"sums over {weight.shape[1]} columns may exceed INT32; {MAX_COLUMNS} are safe"
    return None


def build(directory: Path, config: QuantizeConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes the model in INT8: config.json, model.safetensors (a shared matrix once), tokenizer.json.

    Args:
        directory: Where the files go.
        config: What to quantize.
        parents: `model`: a floating-point model.

    Returns:
        `layers` (rows of the report), `quantized_layers`, `bytes` and `source_bytes` of the weights files.
    """
    source = parents["model"].path
    model = load_candidate(source)
    assert isinstance(model, Decoder), "others are refused before the run starts"
    report = quantize_(model, config)
    save_file(unshared_state(model), directory / WEIGHTS, metadata={"format": "pt"})
    quantization = {"quant_method": QUANT_METHOD, "modules": report.quantized}
    write_json_atomically(directory / CONFIG, {**read_json(source), "quantization_config": quantization})
    copy_tokenizer(source, directory)
    return {
        "layers": [asdict(layer) for layer in report.layers],
        "quantized_layers": len(report.quantized),
        "bytes": (directory / WEIGHTS).stat().st_size,
        "source_bytes": (source / WEIGHTS).stat().st_size,
    }
