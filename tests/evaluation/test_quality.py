from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from flows.artifact import Artifact
from flows.compression import quantize
from flows.compression.candidate import load_candidate
from flows.config import ConfigError
from flows.config.compression import QualityConfig
from flows.config.model import ModelConfig
from flows.config.quantize import QuantizeConfig, QuantizingConfig
from flows.data.packed import IGNORED, PackedDataset, Row
from flows.evaluation import quality
from flows.evaluation.base_states import STATES, BaseScores, StatesFile
from flows.evaluation.quality import Quality, measure_quality
from flows.evaluation.words import WordMarks
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize

VOCAB, LENGTH, TOKENS = 260, 16, 16 * 20 + 7
CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)


def artifact(path: Path) -> Artifact:
    return Artifact(path.name, f"{path.name}-key", "digest", path)


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, Artifact]:
    """A model, a test split of 20 sequences in two shards, and a vocabulary whose tokens have 1 to 4 bytes."""
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCAB, TOKENS).astype("<u2")
    (tmp_path / "tokens").mkdir()
    shards = []
    for number, part in enumerate((ids[:100], ids[100:])):
        (tmp_path / "tokens" / f"test-0000{number}.bin").write_bytes(part.tobytes())
        shards.append({"file": f"test-0000{number}.bin", "tokens": len(part)})
    index = {"dtype": "uint16", "vocab_size": VOCAB, "splits": {"test": {"tokens": TOKENS, "shards": shards}}}
    (tmp_path / "tokens" / "index.json").write_text(json.dumps(index))
    (tmp_path / "tokenizer").mkdir()
    token_bytes = random.integers(1, 5, VOCAB)
    token_bytes[0] = 0
    np.save(tmp_path / "tokenizer" / "token_bytes.npy", token_bytes)
    pieces = {"Ġ" * (number % 3 == 0) + f"w{number}": number for number in range(VOCAB)}  # every third begins a word
    Tokenizer(models.WordLevel(pieces, "Ġw0")).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    model = Decoder(CONFIG, VOCAB)
    initialize(model, seed=0)
    save_decoder(tmp_path / "model", model.state_dict(), CONFIG, VOCAB, LENGTH, 0)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "quality").mkdir()
    return {name: artifact(tmp_path / name) for name in ("model", "tokens", "tokenizer")}


def stream(parents) -> np.ndarray:
    files = sorted(parents["tokens"].path.glob("*.bin"))
    return np.concatenate([np.fromfile(file, "<u2") for file in files]).astype(np.int64)


def measured(model, dataset, sequences, batch_size, token_bytes, base=None, states=None) -> Quality:
    marks = WordMarks(np.arange(VOCAB) % 3 == 0, np.ones(VOCAB, bool))
    return measure_quality(model, base, dataset, sequences, batch_size, token_bytes, marks, states=states)


class _FiveLeftOut(PackedDataset):
    def row(self, index: int) -> Row:
        row = super().row(index)
        left_out = (index == 4) & (np.arange(LENGTH) >= LENGTH - 5)
        return row._replace(targets_L=np.where(left_out, IGNORED, row.targets_L))


def test_measures_follow_their_definitions(tmp_path, parents):
    """Against plain sums over one sequence at a time."""
    metrics = quality.build(tmp_path / "quality", QualityConfig(max_tokens=10**6, sequence_length=LENGTH), parents)
    model = load_candidate(parents["model"].path)
    ids = stream(parents)
    nats, hits, text_bytes = 0.0, 0, 0
    token_bytes = np.load(parents["tokenizer"].path / "token_bytes.npy")
    for start in range(0, 20 * LENGTH, LENGTH):
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, start : start + LENGTH]))[0].double().numpy()
        for position, scores in enumerate(logits):
            target = ids[start + position + 1]
            nats += math.log(np.exp(scores).sum()) - scores[target]
            hits += scores.argmax() == target
            text_bytes += token_bytes[target]
    assert metrics["tokens"] == 320
    assert metrics["bytes"] == text_bytes
    # float32 log-softmax over 260 scores near 0: 2^-24 x ln 260 each, times a few operations
    assert metrics["loss"] == pytest.approx(nats / 320, rel=2e-6)
    assert metrics["accuracy"] == hits / 320
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=2e-6)
    assert metrics["parameters"] == VOCAB * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 3 * 32
    assert json.loads((tmp_path / "quality" / "quality.json").read_text()) == metrics


def test_a_model_that_knows_nothing_has_the_entropy_of_the_vocabulary(parents):
    model = load_candidate(parents["model"].path)
    model.lm_head.weight.zero_()
    dataset = PackedDataset(parents["tokens"].path, "test", LENGTH)
    found = measured(model, dataset, 20, 3, np.full(VOCAB, 2))
    assert found.loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(VOCAB) / 2, rel=1e-6)


def test_distance_from_the_base_model_follows_its_definition(tmp_path, parents, monkeypatch):
    """Against sums in float64; in batches and chunks of any size, without holding all scores."""
    base, model = (load_candidate(parents["model"].path) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    dataset = PackedDataset(parents["tokens"].path, "test", LENGTH)
    ids = torch.from_numpy(np.stack([dataset.row(index).input_ids_L for index in range(20)]))
    with torch.no_grad():
        log_p, log_q = base(ids).double().log_softmax(-1), model(ids).double().log_softmax(-1)
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    agreement = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    assert 0 < agreement < 1
    with StatesFile(tmp_path) as states:
        own = measured(base, dataset, 20, 3, np.ones(VOCAB, int), states=states)
    assert (own.divergence, own.agreement) == (0.0, 1.0)
    assert own == measured(base, dataset, 20, 3, np.ones(VOCAB, int))
    for chunk, batch_size in ((7, 3), (256, 5)):
        monkeypatch.setattr(quality, "CHUNK_TOKENS", chunk)
        found = measured(
            model, dataset, 20, batch_size, np.ones(VOCAB, int), BaseScores(tmp_path, base.lm_head, own.tokens)
        )
        # log-probabilities near ln 260 in float32, of which differences are taken: 2^-24 x ln 260 x a few operations
        assert found.divergence == pytest.approx(expected, abs=4e-6)
        assert found.agreement == agreement


def test_what_is_kept_of_the_base_model_is_exact(tmp_path, parents):
    """As large as the states in float32 and no larger; compared with itself it differs by rounding errors alone."""
    base = load_candidate(parents["model"].path)
    dataset = _FiveLeftOut(parents["tokens"].path, "test", LENGTH)
    with StatesFile(tmp_path) as states:
        own = measured(base, dataset, 20, 3, np.ones(VOCAB, int), states=states)
    assert own.tokens == 20 * LENGTH - 5
    assert (tmp_path / STATES).stat().st_size == own.tokens * CONFIG.hidden_size * 4
    again = measured(base, dataset, 20, 3, np.ones(VOCAB, int), BaseScores(tmp_path, base.lm_head, own.tokens))
    assert again.agreement == 1.0
    assert again.loss == own.loss
    # sums of 32 products in another order move a score by 32 ulp of 1 at most, and KL by twice as much
    assert abs(again.divergence) <= 2 * 32 * 2**-24


def test_words_are_counted_over_all_rows(parents):
    model = load_candidate(parents["model"].path)
    dataset = PackedDataset(parents["tokens"].path, "test", LENGTH)
    targets = np.stack([dataset.row(index).targets_L for index in range(20)])
    inputs = torch.from_numpy(np.stack([dataset.row(index).input_ids_L for index in range(20)]))
    with torch.no_grad():
        right = (model(inputs).argmax(-1).numpy() == targets).tolist()
    words = hits = 0
    for row, row_right in zip(targets.tolist(), right, strict=True):
        begins = [place for place, token in enumerate(row) if token % 3 == 0]
        for first, after in itertools.pairwise(begins):
            words += 1
            hits += all(row_right[first:after])
    found = measured(model, dataset, 20, 3, np.ones(VOCAB, int))
    assert found.words == words > 20
    assert found.word_accuracy == hits / words


def test_batches_of_any_size_agree(parents):
    model = load_candidate(parents["model"].path)
    dataset = PackedDataset(parents["tokens"].path, "test", LENGTH)
    results = [measured(model, dataset, 20, size, np.ones(VOCAB, int)) for size in (1, 7, 20)]
    assert {result.tokens for result in results} == {320}
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].loss == pytest.approx(results[2].loss, rel=1e-6)


def test_max_tokens_bounds_what_is_read(tmp_path, parents):
    metrics = quality.build(
        tmp_path / "quality", QualityConfig(max_tokens=5 * LENGTH + 3, sequence_length=LENGTH), parents
    )
    assert metrics["tokens"] == 5 * LENGTH


def test_int8_is_measured_by_the_same_stage(tmp_path, parents):
    (tmp_path / "int8").mkdir()
    config = QuantizingConfig(quantize=QuantizeConfig(), sequence_length=32)
    quantize.build(tmp_path / "int8", config, {"model": parents["model"]})
    config = QualityConfig(max_tokens=320, sequence_length=LENGTH)
    floating = quality.build(tmp_path / "quality", replace(config, kept_for_others=True), parents)
    base = {"base": parents["model"], "base_quality": replace(artifact(tmp_path / "quality"), metrics=floating)}
    int8 = quality.build(tmp_path / "int8", config, {**parents, **base, "model": artifact(tmp_path / "int8")})
    assert not (tmp_path / "int8" / STATES).exists()
    assert int8["loss"] != floating["loss"]
    assert int8["loss"] == pytest.approx(floating["loss"], rel=0.01)
    assert int8["parameters"] == floating["parameters"]
    assert (floating["divergence"], floating["agreement"]) == (0.0, 1.0)
    assert 0 < int8["divergence"] < 0.01
    assert 0.8 < int8["agreement"] <= 1


def test_a_diverged_model_is_measured_not_hidden(parents):
    model = load_candidate(parents["model"].path)
    model.lm_head.weight.fill_(float("nan"))
    dataset = PackedDataset(parents["tokens"].path, "test", LENGTH)
    found = measured(model, dataset, 2, 2, np.ones(VOCAB, int))
    assert math.isnan(found.loss)
    assert math.isnan(found.bits_per_byte)


def test_fewer_tokens_than_one_sequence_is_an_error(tmp_path, parents):
    with pytest.raises(ConfigError, match=r"evaluate.max_tokens=15 must hold one sequence of data.sequence_length=16"):
        quality.build(tmp_path / "quality", QualityConfig(max_tokens=15, sequence_length=LENGTH), parents)
    with pytest.raises(ConfigError, match="test split"):
        quality.build(tmp_path / "quality", QualityConfig(max_tokens=10**6, sequence_length=400), parents)
