"""Quantization with calibration data: every method on a whole model, and what the report says of it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.artifact import Artifact
from flows.compression import quantize
from flows.compression.calibration import Calibration, draw_calibration
from flows.compression.candidate import load_candidate
from flows.compression.importance import mean_loss
from flows.compression.int8 import sqnr_db
from flows.compression.layer_inputs import walk_blocks
from flows.compression.quantizer import QuantizeReport, quantize_
from flows.config import ConfigError
from flows.config.calibration import CalibrationConfig
from flows.config.model import ModelConfig
from flows.config.quantize import QuantizeConfig, QuantizingConfig, Scheme
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize

SHAPE = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
LAYERS = [
    f"model.layers.{number}.{name}"
    for number in range(2)
    for name in (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]


def decoder(**architecture: Any) -> Decoder:
    """A model whose inputs are correlated, and two channels of whose stream are far larger than the others."""
    model = Decoder(replace(SHAPE, **architecture), 300).requires_grad_(False)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            if name.endswith("layernorm.weight"):
                parameter[[3, 40]] *= 20
        else:
            parameter.mul_(2)
    model.model.embed_tokens.weight.copy_(
        torch.randn(300, 16, generator=generator) @ torch.randn(16, 64, generator=generator) / 8
    )
    return model.eval()


@pytest.fixture
def calibration(tokens: Artifact) -> Calibration:
    config = QuantizeConfig(calibration=CalibrationConfig(sequences=16))
    return draw_calibration(tokens.path, QuantizingConfig(quantize=config, sequence_length=32))


def quantized(model: Decoder, calibration: Calibration, **settings: Any) -> tuple[Decoder, QuantizeReport]:
    small = deepcopy(model)
    config = QuantizeConfig(**settings)
    report, _ = quantize_(small, config, calibration if config.needs_data else None)
    return small, report


def kept_db(model: Decoder, small: Decoder, calibration: Calibration) -> float:
    """How much of the scores of the calibration data is kept."""
    ids, _, _ = next(calibration.batches(300, torch.device("cpu")))
    return sqnr_db(model(ids), small(ids))


def test_inputs_are_those_behind_blocks_as_they_are(calibration: Calibration) -> None:
    model = decoder()
    ids = torch.cat([ids for ids, _, _ in calibration.batches(300, torch.device("cpu"))])
    caught: list[torch.Tensor] = []
    for number, seen in enumerate(walk_blocks(model, calibration, with_gram=True)):
        if number == 0:
            assert list(seen) == LAYERS[:7]
            assert seen[LAYERS[0]] is seen[LAYERS[1]] is seen[LAYERS[2]]
            model.model.layers[0].mlp.down_proj.weight.mul_(3)  # what comes next has to see it
            continue
        name = "lm_head" if number == 2 else LAYERS[7]
        caught.clear()
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        model(ids)
        hook.remove()
        x = caught[0].flatten(0, 1)
        inputs = seen[name]
        assert inputs.rows == len(x) == 16 * 32
        torch.testing.assert_close(inputs.largest, x.abs().amax(0), rtol=1e-5, atol=1e-6)
        assert inputs.gram is not None
        gram = x.double().t() @ x.double()
        torch.testing.assert_close(inputs.gram, gram, rtol=0, atol=1e-5 * float(gram.abs().max()))
        torch.testing.assert_close(inputs.magnitudes, x.abs().double().sum(0), rtol=1e-5, atol=0)
    assert number == 2


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gptq", {"scheme": "w4a16", "search": False}),
        ("gptq", {"scheme": "w4a16", "symmetric": False, "act_order": True}),
        ("awq", {"scheme": "w4a16", "search": False}),
        ("awq", {"scheme": "w4a16"}),
        ("smoothquant", {"scheme": "w8a8"}),
        ("smoothquant", {"scheme": "w8a8_static"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_method_beats_the_nearest_codes_where_inputs_are_as_it_expects(
    calibration: Calibration, method: str, settings: dict[str, Any]
) -> None:
    model = decoder()
    plain, _ = quantized(model, calibration, **{**settings, "act_order": False})
    better, report = quantized(model, calibration, method=method, **settings)
    assert kept_db(model, better, calibration) > kept_db(model, plain, calibration) + 0.5
    assert all(row.output_sqnr_db is not None for row in report.layers if row.name != "model.embed_tokens")


def test_static_scales_of_inputs_are_those_of_the_data(calibration: Calibration) -> None:
    model = decoder()
    small, _ = quantized(model, calibration, scheme="w8a8_static")
    largest = {}
    small_again = deepcopy(small)
    for seen in walk_blocks(model, calibration, with_gram=False):
        largest |= {name: float(inputs.largest.max()) for name, inputs in seen.items()}
    for name in ("model.layers.0.self_attn.q_proj", "lm_head"):
        layer = small_again.get_submodule(name)
        # behind quantized layers inputs are a little different: INT8 keeps 30 dB and more of them
        assert float(layer.input_scale) * 127 == pytest.approx(largest[name], rel=0.05)


@pytest.mark.parametrize("scheme", [scheme for scheme in Scheme if scheme != Scheme.mixed])
def test_every_layer_has_a_row_with_its_scheme_and_what_it_keeps(calibration: Calibration, scheme: Scheme) -> None:
    model = decoder()
    small, report = quantized(model, calibration, scheme=scheme, sensitivity=True, skip_modules=("*.1.*.q_proj",))
    assert [row.name for row in report.layers] == ["model.embed_tokens", *LAYERS, "lm_head"]
    for row in report.layers:
        skipped = row.name == "model.layers.1.self_attn.q_proj"
        assert (row.scheme is None) == (row.skipped_reason is not None) == skipped
        assert (row.sensitivity is None) == skipped
        measured = row.name != "model.embed_tokens" and not skipped
        assert (row.output_sqnr_db is not None) == measured
    table = next(row for row in report.layers if row.name == "lm_head")
    assert table.scheme == (Scheme.w8a8 if scheme == Scheme.fp8 else scheme)
    assert mean_loss(small, calibration) == pytest.approx(mean_loss(model, calibration), rel=0.1)


def test_sensitivity_is_the_divergence_when_one_matrix_alone_is_quantized(calibration: Calibration) -> None:
    model = decoder()
    others = tuple(name for name in ("model.embed_tokens", *LAYERS) if name != LAYERS[3])
    _, report = quantized(model, calibration, scheme="w4a16", sensitivity=True)
    alone, _ = quantized(model, calibration, scheme="w4a16", skip_modules=others)
    total, tokens = 0.0, 0
    for ids, _, _ in calibration.batches(300, torch.device("cpu")):
        expected, found = (torch.log_softmax(one(ids).double(), -1) for one in (model, alone))
        total += float((expected.exp() * (expected - found)).sum())
        tokens += ids.numel()
    row = next(row for row in report.layers if row.name == LAYERS[3])
    # float32 scores of about ten: each of 300 terms is off by up to 1e-6 of its probability
    assert row.sensitivity == pytest.approx(total / tokens, rel=1e-2, abs=1e-6)


def tensor_bytes(directory: Path) -> int:
    """Of a model file without its header."""
    path = directory / "model.safetensors"
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize(
    "budget", [{"max_bytes_ratio": 0.2}, {"max_bytes_ratio": 0.5}, {"max_kl": 1e-4}, {"max_kl": 1e9}]
)
def test_mixed_precision_meets_its_budget(tmp_path: Path, tokens: Artifact, budget: dict[str, float]) -> None:
    model = decoder()
    source, small = tmp_path / "source", tmp_path / "small"
    save_decoder(source, model.state_dict(), SHAPE, 300, 128, 0)
    (source / "tokenizer.json").write_text("{}")
    small.mkdir()
    config = QuantizeConfig(scheme="mixed", calibration=CalibrationConfig(sequences=8), **budget)
    parents = {"model": Artifact("base", "key", "digest", source), "tokens": tokens}
    metrics = quantize.build(small, QuantizingConfig(quantize=config, sequence_length=32), parents)
    rows = [row for row in metrics["layers"] if row["name"] != "lm_head"]  # shares the matrix of the embedding
    ratio = tensor_bytes(small) / tensor_bytes(source)
    if config.max_bytes_ratio is not None:
        assert 0.9 * config.max_bytes_ratio < ratio <= config.max_bytes_ratio
    else:
        assert sum(row["sensitivity"] for row in rows) <= config.max_kl
    schemes = {row["scheme"] for row in rows}
    if config.max_kl == 1e9:
        assert schemes == {"w4a16"}
    elif config.max_bytes_ratio != 0.2:
        assert len(schemes) > 1
        kept = [row["skipped_reason"] for row in rows if row["scheme"] is None]
        assert set(kept) <= {"the budget has room for it in floating point"}
    load_candidate(small)(torch.arange(20)[None])


def test_the_least_sensitive_matrices_go_first() -> None:
    from flows.compression.sensitivity import Choice, choose_schemes

    def forms(kl8: float, kl4: float) -> list[Choice]:
        return [Choice(None, 400, 0.0), Choice(Scheme.w8a8, 100, kl8), Choice(Scheme.w4a16, 50, kl4)]

    choices = {("a",): forms(0.001, 0.1), ("b",): forms(0.002, 0.003), ("c",): forms(0.5, 0.9)}
    config = QuantizeConfig(scheme="mixed", max_bytes_ratio=0.5)
    chosen = choose_schemes(choices, config, other_bytes=0)
    assert [chosen[name].scheme for name in choices] == [Scheme.w8a8, Scheme.w8a8, None]  # 600 of 1200 bytes
    by_quality = QuantizeConfig(scheme="mixed", max_kl=0.0045)
    chosen = choose_schemes(choices, by_quality, other_bytes=0)
    assert [chosen[name].scheme for name in choices] == [Scheme.w8a8, Scheme.w4a16, None]
    with pytest.raises(
        ConfigError, match=r"max_bytes_ratio=0.1 cannot be met: .* leaves 0.125 of 1200 bytes. Set quan"
    ):
        choose_schemes(choices, QuantizeConfig(scheme="mixed", max_bytes_ratio=0.1), other_bytes=0)
