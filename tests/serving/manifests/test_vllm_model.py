"""A checkpoint for the vLLM backend: in a form that its source loads, refused otherwise, never called verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.artifact import Artifact, digest_file
from flows.compression import quantize
from flows.compression.candidate import load_candidate
from flows.config import ConfigError
from flows.config.model import ModelConfig
from flows.config.quantize import QuantizeConfig, QuantizingConfig
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize
from flows.serving import config_pbtxt
from flows.serving.manifests import vllm_model
from flows.serving.releases.state import ReleaseError, check_proven
from flows.serving.repository import PASSPORT
from tests.serving import made_up_repository
from tests.serving.tiny_chain import NAME
from tests.serving.tiny_chain import PASSPORT as PROVEN
from tests.serving.tiny_model import SEQUENCE_LENGTH, VOCAB_SIZE, artifact, make_tokenizer

ENGINE_ARGUMENTS = {
    *("model", "served_model_name", "tokenizer", "dtype", "load_format", "max_model_len", "max_num_seqs", "seed"),
}
"""Fields of the dataclass EngineArgs in vllm/engine/arg_utils.py (vLLM 0.7 to 0.10), those that are in use."""
SHAPE = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
BETWEEN = ("model.embed_tokens", "lm_head")
IDS = torch.arange(40).view(2, 20)
Make = Callable[..., Artifact]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A checkpoint of that shape, quantized if settings are given."""

    def made(shape: ModelConfig = SHAPE, **settings: Any) -> Artifact:
        model = Decoder(shape, VOCAB_SIZE)
        initialize(model, seed=0)
        whole = tmp_path / "whole"
        save_decoder(whole, model.state_dict(), shape, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
        make_tokenizer(whole)
        if not settings:
            return artifact("model", whole)
        (tmp_path / "small").mkdir()
        config = QuantizingConfig(quantize=QuantizeConfig(**settings), sequence_length=SEQUENCE_LENGTH)
        quantize.build(tmp_path / "small", config, {"model": artifact("model", whole)})
        return artifact("model", tmp_path / "small")

    return made


def build(directory: Path, model: Artifact) -> Path:
    return vllm_model.build(directory / "vllm", NAME, 3, PROVEN, model, "/models")


def test_what_is_written_is_the_backends_and_says_that_it_is_not_verified(make: Make, tmp_path: Path) -> None:
    model = make()
    target = build(tmp_path, model)
    place = target / "3"
    config = config_pbtxt.parse((target / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == (f"{NAME}_vllm", "vllm", 0)
    assert config.model_transaction_policy.decoupled
    arguments = json.loads((place / "model.json").read_text())
    assert set(arguments) == ENGINE_ARGUMENTS
    assert arguments["model"] == f"/models/{NAME}_vllm/3/checkpoint"
    assert (arguments["dtype"], arguments["max_model_len"]) == ("float32", SEQUENCE_LENGTH)
    stated = json.loads((place / PASSPORT).read_text())
    assert stated["verdict"] == "not verified"
    assert stated["digests"]["model"] == model.digest
    files = stated["digests"]["served_files"][f"{NAME}_vllm"]
    assert set(files) == {"model.json", *(f"checkpoint/{one.name}" for one in (place / "checkpoint").iterdir())}
    assert all(digest_file(place / name) == digest for name, digest in files.items())
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (place / "checkpoint" / file).read_bytes() == (model.path / file).read_bytes()


def test_what_is_not_verified_is_not_released(make: Make, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    made_up_repository.add_version(repository, 1)
    place = build(tmp_path, make()) / "3"
    (repository / made_up_repository.NAME / "1" / PASSPORT).write_bytes((place / PASSPORT).read_bytes())
    with pytest.raises(ReleaseError, match=r"says 'not verified', not 'passed'\. This version is not released"):
        check_proven(repository, made_up_repository.NAME, 1)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16", "fp8"])
def test_schemes_that_vllm_knows_are_written(make: Make, tmp_path: Path, scheme: str) -> None:
    target = build(tmp_path, make(replace(SHAPE, tie_word_embeddings=False), scheme=scheme, skip_modules=BETWEEN))
    assert json.loads((target / "3" / "model.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("shape", "settings", "told"),
    [
        ({"num_attention_heads": 8}, {}, "has heads 8 wide: vLLM's attention takes 32, 64"),
        ({}, {"scheme": "w8a8"}, "has codes in model.embed_tokens and lm_head: vLLM quantizes layers between"),
        ({}, {"scheme": "w4a8", "skip_modules": BETWEEN}, "has schemes w4a8: vLLM loads one of w8a8, "),
        ({}, {"scheme": "w4a16", "symmetric": False, "skip_modules": BETWEEN}, "has zero points: "),
        ({}, {"scheme": "w8a8", "skip_modules": (*BETWEEN, "*.v_proj")}, "has codes in a part of .*v_proj: vLLM makes"),
    ],
)
def test_what_vllm_does_not_load_is_refused(
    make: Make, tmp_path: Path, shape: dict[str, Any], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=f"manifests.vllm=True cannot be done for {NAME}, whose checkpoint {told}"):
        build(tmp_path, make(replace(SHAPE, **shape), **settings))
    assert not (tmp_path / "vllm").exists()


def test_other_kinds_of_checkpoints_are_refused() -> None:
    for found, told in (
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel"),
        ({"architectures": ["LlamaForCausalLM"], "head_dim": 64, "quantization_config": {"quant_method": "x"}}, "x"),
    ):
        with pytest.raises(ConfigError, match=f"whose checkpoint has .*{told}"):
            vllm_model.check_loaded(NAME, found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", [{}, {"scheme": "w8a16", "skip_modules": BETWEEN}], ids=["float", "w8a16"])
def test_transformers_computes_with_it_what_we_do(make: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = make(replace(SHAPE, tie_word_embeddings=False), **settings)
    checkpoint = build(tmp_path, model) / "3" / "checkpoint"
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        # float32 twins of a layer and a head
        torch.testing.assert_close(theirs(IDS).logits, load_candidate(model.path)(IDS), rtol=1e-4, atol=1e-5)
