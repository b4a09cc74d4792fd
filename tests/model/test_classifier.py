"""Models that classify: the library's scores with any padding, from every kind of model, and heads that are new."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from flows.compression.candidate import load_candidate
from flows.config import ConfigError
from flows.config.model import Architecture, Family, ModelConfig
from flows.model.checkpoint import check_initial_weights, load_initial_model
from flows.model.transformers_model import (
    CLASS_HEADS,
    MASKED_HEADS,
    ClassifierModel,
    load_transformers_model,
    model_without_weights,
    new_encoder,
    save_transformers_model,
)
from tests.model.test_transformers_model import NOISE, OF_ENCODERS, OWN_NAMES, SHAPE, VOCAB

LABELS = ["bad", "good", "so so"]
TRIED = ("bert", "distilbert", "gpt2")


def saved(directory: Path, kind: str) -> Path:
    torch.manual_seed(0)
    more = {"pad_token_id": 1} if kind in MASKED_HEADS else {}
    shape = SHAPE | OF_ENCODERS.get(kind, {}) | OWN_NAMES.get(kind, {}) | more
    described = AutoConfig.for_model(kind, **shape, id2label=dict(enumerate(LABELS)))
    model = AutoModelForSequenceClassification.from_config(described)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [one if one in TRIED else pytest.param(one, marks=pytest.mark.exhaustive) for one in CLASS_HEADS]
)
def test_scores_are_those_of_the_library_with_any_padding(kind: str, tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", kind)
    ours = load_candidate(directory)
    assert isinstance(ours, ClassifierModel)
    assert ours.labels == LABELS
    theirs = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    ids, others = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)).split(1)
    expected = theirs(ids).logits
    noise = NOISE * expected.abs().max()
    assert (theirs(others).logits - expected).abs().max() > 100 * noise, "the text matters"
    assert (ours(ids)[:, 0] - expected).abs().max() <= noise
    filler = torch.ones(1, 3, dtype=torch.int64)
    for padded in ((filler, ids), (ids, filler)):
        mask = torch.cat([torch.ones_like(part) * (part is ids) for part in padded], 1)
        assert (ours(torch.cat(padded, 1), mask)[:, 0] - expected).abs().max() <= noise
    documents = torch.tensor([[0] * 9 + [1] * 9])
    assert (ours(torch.cat((ids, others), 1), document_ids_BL=documents)[:, 0] - expected).abs().max() <= noise
    weights = {name: 2 * value for name, value in ours.inner.named_parameters()}
    save_transformers_model(tmp_path / "saved", ours, weights)
    again = load_transformers_model(tmp_path / "saved")
    assert isinstance(again, ClassifierModel)
    assert all(torch.equal(value, weights[name]) for name, value in again.inner.named_parameters())


def described(directory: Path | None) -> ModelConfig:
    return ModelConfig(
        architecture=Architecture.transformers,
        family=Family.sequence_classification,
        initial_weights=directory,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
    )


def test_a_language_model_gets_a_head_that_every_rank_draws_alike(tmp_path: Path) -> None:
    directory = tmp_path / "bert"
    torch.manual_seed(0)
    shape = SHAPE | {"pad_token_id": 1}
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **shape)).save_pretrained(directory)
    config = described(directory)
    check_initial_weights(config)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_initial_model(config, VOCAB, labels=LABELS))
    heads = [model.inner.classifier.weight for model in models]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    old = AutoModelForMaskedLM.from_pretrained(directory).bert.encoder.layer[0].output.dense.weight
    assert all(torch.equal(model.inner.bert.encoder.layer[0].output.dense.weight, old) for model in models)
    assert all(module.training for model in models for module in model.modules()), "dropout from the first step on"
    assert {name for name, _ in model_without_weights(config).named_parameters()} == {
        name for name, _ in models[0].inner.named_parameters()
    }


def test_a_model_that_gives_other_labels_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", "bert")
    assert load_initial_model(described(directory), VOCAB, labels=LABELS)
    with pytest.raises(ConfigError, match=r"gives the labels \['bad', 'good', 'so so'\], and the data has \['bad'"):
        load_initial_model(described(directory), VOCAB, labels=["bad", "good"])
    with pytest.raises(ConfigError, match=r"which is no masked_lm. Set model.family=sequence_classification"):
        check_initial_weights(
            ModelConfig(architecture=Architecture.transformers, family=Family.masked_lm, initial_weights=directory)
        )


def test_a_new_encoder_has_the_shape_that_is_asked_for() -> None:
    torch.manual_seed(0)
    model = new_encoder(described(None), VOCAB, LABELS, sequence_length=20)
    assert model.labels == LABELS
    assert model(torch.zeros(2, 20, dtype=torch.int64)).shape == (2, 1, 3)
    assert [name for name, _ in model_without_weights(described(None)).named_parameters()] == [
        name for name, _ in model.inner.named_parameters()
    ]
