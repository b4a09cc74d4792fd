from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flows.artifact import Artifact
from flows.config.model import ModelConfig
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )


@pytest.fixture
def model(config: ModelConfig) -> Decoder:
    model = Decoder(config, vocab_size=300)
    initialize(model, seed=0)
    return model.requires_grad_(False)


@pytest.fixture
def source(tmp_path: Path, config: ModelConfig, model: Decoder) -> Artifact:
    """The model as a floating-point artifact."""
    directory = tmp_path / "source"
    save_decoder(directory, model.state_dict(), config, 300, 128, 0)
    (directory / "tokenizer.json").write_text('{"any": "tokenizer"}')
    return Artifact("base", "base-key", "digest", directory)


@pytest.fixture
def tokens(tmp_path: Path) -> Artifact:
    """A training split of 40 sequences of 32 tokens."""
    directory = tmp_path / "tokens"
    directory.mkdir()
    np.random.default_rng(0).integers(1, 300, 40 * 32 + 1).astype("<u2").tofile(directory / "train-00000.bin")
    shard = {"file": "train-00000.bin", "tokens": 40 * 32 + 1, "documents": 1}
    index = {"dtype": "uint16", "vocab_size": 300, "eos_token_id": 0, "splits": {"train": {"shards": [shard]}}}
    (directory / "index.json").write_text(json.dumps(index))
    return Artifact("tokens", "tokens-key", "digest", directory)
