"""Models of the transformers library with our interface: the same scores, any padding; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, DebertaConfig

from flows.config import ConfigError
from flows.config.model import Architecture, Family, ModelConfig
from flows.model.checkpoint import check_initial_weights, load_initial_model
from flows.model.config_json import CheckpointError
from flows.model.transformers_model import (
    COUNT_FROM_PADDING,
    KINDS,
    MASKED_HEADS,
    MaskedModel,
    TransformersModel,
    check_kind,
    load_transformers_model,
    longest_context,
    model_without_weights,
    save_transformers_model,
)

VOCAB = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
OWN_NAMES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8},
    "gptj": {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"num_key_value_heads": 4},
}
OF_ENCODERS: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 6, "cls_token_id": 2, "sep_token_id": 3},
}
NOISE = 64 * torch.finfo(torch.float32).eps


def saved(directory: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind in MASKED_HEADS:
        described = AutoConfig.for_model(kind, **SHAPE | OF_ENCODERS.get(kind, {}) | {"pad_token_id": 1})
        model = AutoModelForMaskedLM.from_config(described)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | OWN_NAMES.get(kind, {})))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_library_with_any_padding(kind: str, tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", kind)
    ours = load_transformers_model(directory).eval()
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.randint(1, VOCAB, (1, 7), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    noise = NOISE * expected.abs().max()
    assert expected.std() > 0.01
    assert (ours(ids) - expected).abs().max() <= noise
    filler = torch.zeros(1, 3, dtype=torch.int64)
    for padded, at in (((filler, ids), slice(3, None)), ((ids, filler), slice(None, 7))):
        mask = torch.cat([torch.ones_like(part) * (part is ids) for part in padded], 1)
        assert (ours(torch.cat(padded, 1), mask)[:, at] - expected).abs().max() <= noise
    weights = {name: 2 * value for name, value in ours.inner.named_parameters()}
    save_transformers_model(tmp_path / "saved", ours, weights)
    again = load_transformers_model(tmp_path / "saved")
    assert all(torch.equal(value, weights[name]) for name, value in again.inner.named_parameters())
    described = ModelConfig(architecture=Architecture.transformers, initial_weights=directory)
    assert [name for name, _ in model_without_weights(described).named_parameters()] == list(weights)


@torch.no_grad()
@pytest.mark.parametrize("kind", MASKED_HEADS)
def test_an_encoders_scores_are_those_of_the_library_with_any_padding_and_neighbours(kind: str, tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", kind)
    ours = load_transformers_model(directory).eval()
    assert isinstance(ours, MaskedModel)
    theirs = AutoModelForMaskedLM.from_pretrained(directory).eval()
    ids, others = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)).split(1)
    expected, of_others = theirs(ids).logits, theirs(others).logits
    noise = NOISE * expected.abs().max()
    assert expected.std() > 0.01
    assert (ours(ids) - expected).abs().max() <= noise
    filler = torch.ones(1, 3, dtype=torch.int64)
    for padded, at in (((filler, ids), slice(3, None)), ((ids, filler), slice(None, 9))):
        mask = torch.cat([torch.ones_like(part) * (part is ids) for part in padded], 1)
        scores = ours(torch.cat(padded, 1), mask)
        assert scores.isfinite().all()
        assert (scores[:, at] - expected).abs().max() <= noise
    documents = torch.tensor([[0] * 9 + [1] * 9])
    both = ours(torch.cat((ids, others), 1), document_ids_BL=documents)
    assert (both[:, :9] - expected).abs().max() <= noise
    assert (both[:, 9:] - of_others).abs().max() <= noise
    assert (ours(torch.cat((ids, others), 1))[:, :9] - expected).abs().max() > 100 * noise, "neighbours matter"
    weights = {name: 2 * value for name, value in ours.inner.named_parameters()}
    save_transformers_model(tmp_path / "saved", ours, weights)
    again = load_transformers_model(tmp_path / "saved")
    assert all(torch.equal(value, weights[name]) for name, value in again.inner.named_parameters())
    described = ModelConfig(architecture=Architecture.transformers, family=Family.masked_lm, initial_weights=directory)
    assert [name for name, _ in model_without_weights(described).named_parameters()] == list(weights)
    longest = longest_context(check_kind(directory))
    assert longest == (62 if kind in COUNT_FROM_PADDING else 64)
    assert ours(torch.full((1, longest), 5)).isfinite().all()


def test_what_cannot_be_taken_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path / "gpt2", "gpt2")
    config = ModelConfig(architecture=Architecture.transformers, initial_weights=directory)
    check_initial_weights(config)
    assert isinstance(load_initial_model(config, VOCAB), TransformersModel)
    with pytest.raises(ConfigError, match=r"have vocab_size=97, and this run's tokenizer 50"):
        load_initial_model(config, 50)
    with pytest.raises(ConfigError, match=r"model\.architecture=transformers needs a model to start from"):
        ModelConfig(architecture=Architecture.transformers)
    with pytest.raises(ConfigError, match=r"model_type=gpt2, which is no masked_lm\. Set model\.family=causal_lm"):
        check_initial_weights(replace(config, family=Family.masked_lm))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"model_type=bert, which is no causal_lm\. Set model\.family=masked_lm"):
        check_initial_weights(replace(config, initial_weights=tmp_path / "bert"))
    DebertaConfig().save_pretrained(tmp_path / "deberta")
    with pytest.raises(ConfigError, match=r"model_type=deberta; what is taken .*, bert, .* with masked_lm"):
        check_initial_weights(replace(config, initial_weights=tmp_path / "deberta", family=Family.masked_lm))
    with pytest.raises(ConfigError, match=r"model\.family=masked_lm cannot be combined .* Set model\.architecture"):
        ModelConfig(family=Family.masked_lm)
    path = saved(tmp_path / "phi3", "phi3") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": 32}))
    with pytest.raises(CheckpointError, match=r"has sliding_window=32, which cannot be exported"):
        load_transformers_model(tmp_path / "phi3")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot be read by transformers"):
        load_transformers_model(directory)


def test_scores_that_are_no_projection_of_hidden_states_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path, "gpt2")
    load_transformers_model(directory)
    monkeypatch.setattr("flows.model.transformers_model.KINDS", ("granite",))
    torch.manual_seed(0)
    granite = AutoConfig.for_model("granite", **SHAPE, logits_scaling=4.0)
    AutoModelForCausalLM.from_config(granite).save_pretrained(tmp_path / "granite")
    with pytest.raises(CheckpointError, match="does more to its scores"):
        load_transformers_model(tmp_path / "granite")
