"""A tiny random decoder, its tokenizer, its tokens and its program, as the stages before serving leave them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flows.artifact import Artifact, _content_digest, _digest_files
from flows.config.model import Kernels, ModelConfig
from flows.config.serving import CacheDtype, GenerationConfig
from flows.export import generation, program
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize

SEQUENCE_LENGTH = 32
VOCAB_SIZE = 280
MODEL = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # scores that differ clearly from each other
    kernels=Kernels.reference,
)


def artifact(stage: str, path: Path) -> Artifact:
    digest = _content_digest(_digest_files(path))
    return Artifact(stage=stage, key=f"{stage}-{digest[:20]}", digest=digest, path=path)


def make_tokenizer(directory: Path, seed: int = 0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["import", "return", "self", "def", "class", "value", "number", "while", "print", "äußern"]
    random.Random(seed).shuffle(words)
    tokenizer.train_from_iterator([" ".join(words[:7])] * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def make_checkpoint(directory: Path, tokenizer: Path, seed: int = 0, config: ModelConfig = MODEL) -> Path:
    model = Decoder(config, VOCAB_SIZE)
    initialize(model, seed)
    save_decoder(directory, model.state_dict(), config, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
    (directory / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    return directory


def make_program(directory: Path, checkpoint: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    program.build(directory, None, {"model": artifact("model", checkpoint)})
    return directory


def make_generation(directory: Path, checkpoint: Path, cache_dtype: CacheDtype = CacheDtype.float32) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    generation.build(directory, GenerationConfig(cache_dtype=cache_dtype), {"model": artifact("model", checkpoint)})
    return directory


def make_tokens(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(7).integers(1, VOCAB_SIZE, 1000).astype("<u2")
    ids[::90] = 0
    splits = {}
    for split in ("train", "validation", "test"):
        name = f"{split}-00000"
        ids.tofile(directory / f"{name}.bin")
        starts = np.flatnonzero(ids == 0) + 1
        starts = np.concatenate(([0], starts[starts < len(ids)])).astype(np.int64)
        np.save(directory / f"{name}.documents.npy", starts)
        shard = {"file": f"{name}.bin", "tokens": len(ids), "documents": len(starts)}
        splits[split] = {"tokens": len(ids), "documents": len(starts), "bytes": 3000, "shards": [shard]}
    index = {"dtype": "uint16", "vocab_size": VOCAB_SIZE, "eos_token_id": 0, "splits": splits}
    (directory / "index.json").write_text(json.dumps(index))
    return directory


def changed(**fields: object) -> ModelConfig:
    return replace(MODEL, **fields)  # type: ignore[arg-type]
