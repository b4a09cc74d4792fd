"""Time and quality of quantization against torchao, as ratios within one run: `python -m flows.compression.bench`.

The arguments are a floating-point model's artifact and that of the tokens that it was trained on, e.g.
artifacts/base-... and artifacts/tokens-.... Both quantize the linear layers of the same model, embedding and head left
out; loss is that on test sequences, computed by the layers of each. torchao is no dependency of ours:
`pip install torchao==0.18.0`.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flows.compression.calibration import Calibration, draw_calibration
from flows.compression.candidate import load_candidate, matrices
from flows.compression.importance import mean_loss
from flows.compression.int8 import sqnr_db
from flows.compression.quantizer import quantize_
from flows.config import ConfigError, RunError
from flows.config.calibration import CalibrationConfig
from flows.config.quantize import Method, QuantizeConfig, QuantizingConfig, Scheme
from flows.data.mixture import open_split
from flows.model.config_json import read_json
from flows.model.decoder import Decoder

REPETITIONS = 3
LEFT_OUT = ("model.embed_tokens", "lm_head")
OURS = {
    "w8a8": QuantizeConfig(),
    "w8a16": QuantizeConfig(scheme=Scheme.w8a16),
    "w4a16": QuantizeConfig(scheme=Scheme.w4a16),
    "w4a16 gptq": QuantizeConfig(scheme=Scheme.w4a16, method=Method.gptq),
    "w4a16 awq": QuantizeConfig(scheme=Scheme.w4a16, method=Method.awq),
}


@dataclass(frozen=True)
class Measured:
    """What one way to quantize gave."""

    seconds: float
    """Median."""
    sqnr_db: float
    """Of weights, the mean over layers."""
    loss: float
    """Nats per token on test sequences."""


def compare(
    model_dir: Path,
    tokens_dir: Path,
    sequences: int,
    rivals: Mapping[str, Callable[[nn.Module], Any]],
    own: Mapping[str, QuantizeConfig] = OURS,
) -> None:
    """Prints time, weights' SQNR and test loss of every way, and ratios to the rival's of the same scheme.

    Args:
        model_dir: A floating-point model.
        tokens_dir: The tokens that it was trained on.
        sequences: How many calibration and test sequences.
        rivals: Quantize a model in place, by scheme.
        own: Our ways; the first word of a name is its scheme.
    """
    model = load_candidate(model_dir)
    assert isinstance(model, Decoder)
    length = int(read_json(model_dir)["max_position_embeddings"])
    config = QuantizingConfig(
        quantize=QuantizeConfig(calibration=CalibrationConfig(sequences=sequences)), sequence_length=length
    )
    calibration = draw_calibration(tokens_dir, config)
    split = open_split(tokens_dir, "test", length)
    test = Calibration(split, np.asarray(split.first(sequences)), length)
    skipped = tuple(name for name in LEFT_OUT if name in matrices(model))

    def ours(settings: QuantizeConfig) -> Callable[[nn.Module], Any]:
        chosen = {**vars(settings), "skip_modules": skipped}
        return lambda one: quantize_(one, QuantizeConfig(**chosen), calibration if settings.needs_data else None)

    ways = {name: ours(settings) for name, settings in own.items()}
    ways |= {f"torchao {name}": rival for name, rival in rivals.items()}
    found = measure(model, ways, test)
    print(
        f"{len(matrices(model)) - len(skipped)} layers, {sequences} sequences of {length} tokens, "
        f"medians of {REPETITIONS} repetitions that take turns"
    )
    print(f"{'floating point':>16} {'':8}   {'':10} loss {mean_loss(model, test):.4f}")
    for name, one in found.items():
        print(f"{name:>16} {one.seconds:8.3f} s {one.sqnr_db:7.2f} dB loss {one.loss:.4f}")
    for name in own:
        rival = found.get(f"torchao {name.split()[0]}")
        if rival is not None:
            speed, quality = rival.seconds / found[name].seconds, found[name].loss / rival.loss
            print(f"{name} against torchao {name.split()[0]}: {speed:.2f} x as fast, {quality:.5f} x its loss")


@torch.no_grad()
def measure(model: Decoder, ways: Mapping[str, Callable[[nn.Module], Any]], test: Calibration) -> dict[str, Measured]:
    """Every way on a copy of the model; they take turns, so that a busy machine is fair to all.

    Args:
        model: In floating point.
        ways: Quantize a model in place.
        test: What loss is measured on.
    """
    weights = {name: layer.weight for name, layer in matrices(model).items() if name not in LEFT_OUT}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Measured] = {}
    for repetition in range(REPETITIONS):
        for name, way in ways.items():
            small = deepcopy(model)
            started = time.perf_counter()
            result = way(small)
            seconds[name].append(time.perf_counter() - started)
            if repetition == 0:
                found[name] = Measured(0.0, _kept_db(small, weights, result), mean_loss(small, test))
    return {name: Measured(statistics.median(seconds[name]), one.sqnr_db, one.loss) for name, one in found.items()}


def _kept_db(small: nn.Module, weights: Mapping[str, torch.Tensor], result: Any) -> float:
    if result is not None:  # ours, whose report knows about weights that were scaled before
        return float(statistics.mean(row.sqnr_db for row in result[0].layers if row.skipped_reason is None))
    layers: dict[str, Any] = dict(small.named_modules())
    return statistics.mean(sqnr_db(weight, layers[name].weight.dequantize()) for name, weight in weights.items())


def torchao_rivals() -> dict[str, Callable[[nn.Module], Any]]:
    """What torchao offers for the same schemes.

    Raises:
        RunError: It is not installed, or not for this torch.
    """
    try:
        theirs, granularity = (
            importlib.import_module(f"torchao.{name}") for name in ("quantization", "quantization.granularity")
        )
    except (ImportError, OSError) as error:
        raise RunError(f"torchao cannot be imported: {error}. Run `pip install torchao==0.18.0`.") from error
    int4 = theirs.IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=granularity.PerGroup(32))
    configs = {
        "w8a8": theirs.Int8DynamicActivationInt8WeightConfig(),
        "w8a16": theirs.Int8WeightOnlyConfig(),
        "w4a16": int4,
    }

    def chosen(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and name not in LEFT_OUT

    def rival(config: Any) -> Callable[[nn.Module], Any]:
        return lambda model: theirs.quantize_(model, config, filter_fn=chosen)

    return {name: rival(config) for name, config in configs.items()}


def run() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a floating-point model")
    parser.add_argument("tokens", type=Path, help="directory of the tokens that it was trained on")
    parser.add_argument("--sequences", type=int, default=32, help="calibration and test sequences; default 32")
    arguments = parser.parse_args()
    try:
        compare(arguments.model, arguments.tokens, arguments.sequences, torchao_rivals())
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
