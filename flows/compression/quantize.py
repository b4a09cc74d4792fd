"""Stage: a model's matrices in few bits, really stored, with a report of every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flows.artifact import Artifact, write_json_atomically
from flows.compression.calibration import draw_calibration
from flows.compression.candidate import EMBEDDING, load_candidate, matrices, quantized_state
from flows.compression.compressed_tensors_layout import quantization_config
from flows.compression.quantizer import quantize_
from flows.config.quantize import QuantizingConfig
from flows.data.tokenizer import copy_tokenizer
from flows.model.checkpoint import WEIGHTS
from flows.model.config_json import CONFIG, read_json
from flows.model.decoder import Decoder


def build(directory: Path, config: QuantizingConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes the model in few bits: config.json, model.safetensors (a shared matrix once), tokenizer.json.

    Args:
        directory: Where the files go.
        config: What is quantized, and how inputs are measured.
        parents: `model`: a floating-point model; `tokens` where calibration data is needed. Runs on a GPU then.

    Returns:
        `layers` (rows of the report), `quantized_layers`, `schemes` (layers of each), `bytes` and `source_bytes` of the
        weights files, and `calibration`, or None.
    """
    source = parents["model"].path
    model = load_candidate(source)
    assert isinstance(model, Decoder), "others are refused before the run starts"
    layers = matrices(model)
    calibration = None
    if "tokens" in parents:
        calibration = draw_calibration(parents["tokens"].path, config)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    report, coded = quantize_(model, config.quantize, calibration)
    state = quantized_state(model, coded)
    save_file({name: tensor.cpu() for name, tensor in state.items()}, directory / WEIGHTS, metadata={"format": "pt"})
    found = quantization_config(coded, [name for name in layers if name != EMBEDDING])
    write_json_atomically(directory / CONFIG, {**read_json(source), "quantization_config": found})
    copy_tokenizer(source, directory)
    schemes: dict[str, int] = defaultdict(int)
    for row in report.layers:
        schemes[row.scheme or "floating point"] += 1
    return {
        "layers": [asdict(layer) for layer in report.layers],
        "quantized_layers": len(report.quantized),
        "schemes": dict(schemes),
        "bytes": (directory / WEIGHTS).stat().st_size,
        "source_bytes": (source / WEIGHTS).stat().st_size,
        "calibration": None if calibration is None else calibration.to_metrics(),
    }
