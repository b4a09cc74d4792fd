"""The whole chain on an encoder, as its user types it: trained, measured and kept, and nothing published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import WordPieceTrainer
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from tests.flows.workplace import ROOT, Workplace

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "+experiment=smoke",
    "model.architecture=transformers",
    "model.family=masked_lm",
    "data.tokenizer.directory=${model.initial_weights}",
    "steps=none",
]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    directory = tmp_path / "bert"
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    sources = sorted((ROOT / "flows").rglob("*.py"))
    trainer = WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator((path.read_text() for path in sources), trainer)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]", "sep_token": "[SEP]"}))
    return directory


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_an_encoder_is_trained_measured_and_kept(bert: Path, tmp_path: Path) -> None:
    place = Workplace(tmp_path / "place")
    words = [*WORDS, f"model.initial_weights={bert}"]
    refused = place.run("train", *words)
    assert refused.returncode == 2
    assert "Set publish.candidate=none" in refused.stderr
    done = place.run("train", *words, "publish.candidate=none")
    assert done.returncode == 0, done.stderr
    assert "Nothing is published, as publish.candidate=none: 1 of 1 candidates passed the gates" in done.stdout
    assert "publish.candidate=none asks for that" in (tmp_path / "place/artifacts/runs/smoke/report.html").read_text()
    assert not list((tmp_path / "place").glob("model_repo/*"))
    assert {"base", "base_program", "base_quality", "gates", "report"} <= set(place.ran("smoke"))
    (trained,) = (tmp_path / "place/artifacts/store").glob("base-*")
    _, report = AutoModelForMaskedLM.from_pretrained(trained, output_loading_info=True)
    assert not any(report.values())
