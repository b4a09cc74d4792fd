from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flows.artifact import Artifact
from flows.compression import quantize
from flows.compression.candidate import count_parameters, load_candidate
from flows.compression.int8 import Int8Embedding
from flows.compression.quantized_linear import W8A8Linear
from flows.compression.quantizer import quantize_
from flows.config import ConfigError
from flows.config.model import Kernels, ModelConfig
from flows.config.quantize import QuantizeConfig, QuantizingConfig
from flows.model.checkpoint import save_decoder
from flows.model.config_json import CheckpointError
from flows.model.decoder import Decoder, initialize

IDS = torch.arange(40).view(2, 20)


def of(config: QuantizeConfig) -> QuantizingConfig:
    return QuantizingConfig(quantize=config, sequence_length=32)


def built(tmp_path: Path, source: Artifact, config: QuantizeConfig | None = None, name: str = "int8") -> Path:
    directory = tmp_path / name
    directory.mkdir()
    quantize.build(directory, of(config or QuantizeConfig()), {"model": source})
    return directory


def test_every_linear_layer_and_the_embedding_become_int8(model):
    before = model(IDS)
    report, _ = quantize_(model, QuantizeConfig())
    assert len(report.layers) == 2 * 7 + 2
    assert report.quantized == [layer.name for layer in report.layers]
    assert not any(isinstance(layer, nn.Linear | nn.Embedding) for layer in model.modules())
    assert isinstance(model.model.embed_tokens, Int8Embedding)
    assert isinstance(model.lm_head, W8A8Linear)
    # codes of normal weights: amax <= 4.5 sigma leaves 12 x (127 / 4.5)^2 = 39.8 dB at worst
    assert all(layer.sqnr_db > 39.8 for layer in report.layers)
    cosine = torch.cosine_similarity(model(IDS).flatten(), before.flatten(), dim=0)
    assert cosine > 0.99


def test_a_shared_matrix_stays_shared(model):
    quantize_(model, QuantizeConfig())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_skipped_layers_stay_as_they_are_and_are_reported(model):
    kept = model.model.layers[1].mlp.down_proj
    report, _ = quantize_(model, QuantizeConfig(skip_modules=("*.1.*.down_proj",)))
    assert model.model.layers[1].mlp.down_proj is kept
    reasons = {layer.name: layer.skipped_reason for layer in report.layers if layer.skipped_reason}
    assert reasons == {
        "model.layers.1.mlp.down_proj": "model.layers.1.mlp.down_proj matches quantize.skip_modules=*.1.*.down_proj"
    }


def test_skipping_one_user_of_a_shared_matrix_skips_the_other(model):
    report, _ = quantize_(model, QuantizeConfig(skip_modules=("lm_head",)))
    skipped = [layer.name for layer in report.layers if layer.skipped_reason]
    assert skipped == ["model.embed_tokens", "lm_head"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_whose_weights_suffer_stays_in_floating_point(model):
    model.model.layers[0].self_attn.v_proj.weight[:, 0] = 50.0  # all else drowns in steps of 50 / 127
    model.model.layers[0].self_attn.v_proj.weight[:, 0] *= torch.tensor([1.0, 1.001] * 16)
    model.model.layers[0].self_attn.v_proj.weight[:, 1:] = 0.19  # just below half a step
    report, _ = quantize_(model, QuantizeConfig(min_sqnr_db=36.0))
    rows = [layer for layer in report.layers if layer.skipped_reason]
    assert [row.name for row in rows] == ["model.layers.0.self_attn.v_proj"]
    assert rows[0].skipped_reason == f"its weights keep {rows[0].sqnr_db:.1f} dB, less than quantize.min_sqnr_db=36"


def test_a_pattern_that_matches_nothing_is_an_error_with_a_remedy(model):
    with pytest.raises(ConfigError, match=r"quantize.skip_modules=\*.dwon_proj matches none of the model's 16 layers"):
        quantize_(model, QuantizeConfig(skip_modules=("*.dwon_proj",)))


def test_nothing_left_to_quantize_is_an_error(model):
    with pytest.raises(ConfigError, match="leave none of 16 layers to quantize"):
        quantize_(model, QuantizeConfig(skip_modules=("*",)))


def test_weights_are_stored_as_codes_once(tmp_path, source):
    directory = built(tmp_path, source)
    stored = load_file(directory / "model.safetensors")
    matrices = {name: tensor for name, tensor in stored.items() if name.endswith(".weight") and tensor.dim() == 2}
    assert {tensor.dtype for tensor in matrices.values()} == {torch.int8}
    assert not any(name.startswith("lm_head") for name in stored)
    assert stored["model.embed_tokens.weight_scale"].shape == (300, 1)
    weights = sum(tensor.nbytes for tensor in matrices.values())
    assert weights == sum(p.numel() for p in load_candidate(source.path).parameters()) - 5 * 64
    scales = 4 * sum(tensor.shape[0] for tensor in matrices.values())
    norms = 4 * 5 * 64
    header = (directory / "model.safetensors").stat().st_size - weights - scales - norms
    assert 0 < header < 160 * len(stored)


def test_metrics_tell_sizes_and_layers(tmp_path, source):
    directory = tmp_path / "int8"
    directory.mkdir()
    metrics = quantize.build(directory, of(QuantizeConfig(skip_modules=("*.o_proj",))), {"model": source})
    assert metrics["bytes"] == (directory / "model.safetensors").stat().st_size
    assert metrics["source_bytes"] == (source.path / "model.safetensors").stat().st_size
    assert metrics["quantized_layers"] == 14
    assert [row["name"] for row in metrics["layers"] if row["skipped_reason"]] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    json.dumps(metrics)


@pytest.mark.parametrize("skip", [(), ("*.up_proj",), ("lm_head",)])
def test_loading_gives_exactly_the_model_that_was_quantized(tmp_path, source, model, skip):
    config = QuantizeConfig(skip_modules=skip)
    directory = built(tmp_path, source, config)
    loaded = load_candidate(directory)
    quantize_(model, config)
    assert torch.equal(loaded(IDS), model(IDS))
    assert torch.equal(loaded.forward_hidden(IDS), model.forward_hidden(IDS))
    assert loaded.model.layers[0].mlp.down_proj.kernels == "reference"
    assert load_candidate(directory, Kernels.auto).model.layers[0].mlp.down_proj.kernels == "auto"
    assert (
        count_parameters(loaded)
        == count_parameters(model)
        == sum(p.numel() for p in load_candidate(source.path).parameters())
    )


def test_an_untied_head_is_stored_and_loaded(tmp_path, config):
    untied = ModelConfig(**{**vars(config), "tie_word_embeddings": False})
    model = Decoder(untied, vocab_size=300)
    initialize(model, seed=1)
    save_decoder(tmp_path / "source", model.state_dict(), untied, 300, 128, 0)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    directory = built(tmp_path, Artifact("base", "key", "digest", tmp_path / "source"))
    quantize_(model, QuantizeConfig())
    assert torch.equal(load_candidate(directory)(IDS), model(IDS))


def test_same_input_gives_same_bytes(tmp_path, source):
    first, second = built(tmp_path, source, name="first"), built(tmp_path, source, name="second")
    names = sorted(path.name for path in first.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_another_quantization_format_is_refused(tmp_path, source):
    directory = built(tmp_path, source)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quant_method=gptq"):
        load_candidate(directory)


def test_missing_weights_are_named(tmp_path, source):
    directory = built(tmp_path, source)
    stored = load_file(directory / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(stored, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight_scale"):
        load_candidate(directory)
    (directory / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_candidate(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_candidate(directory)
