"""Text and conversations, mixed, told apart, trained in a real rank: what was seen is counted and proven."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows import receipts
from flows.artifact import Artifact, ArtifactStore, Stage, load_artifact
from flows.config.compression import QualityConfig
from flows.config.data import CorpusConfig, DataConfig, Format, MixedCorpus, Source, TokenizerConfig
from flows.config.training import TrainingRun
from flows.data.mixture import open_split
from flows.data.packed import IGNORED
from flows.evaluation import quality
from flows.training.receipts import ReceiptError, verify_receipts


def chat(number: int) -> dict[str, list[dict[str, str]]]:
    turns = [("user", f"add one to {number}"), ("assistant", f"{number + 1}")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def made(tmp_path: Path, tiny_run: Callable[..., TrainingRun]) -> dict[str, Artifact]:
    """The chain up to the model, twelve steps of eight sequences."""
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat(number)) + "\n" for number in range(150)))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"note {i}. " * 3}) + "\n" for i in range(200)))
    shares = {"validation_fraction": 0.1, "test_fraction": 0.1}
    text = CorpusConfig(source=Source.files, paths=(f"{tmp_path}/texts.jsonl",), **shares)  # type: ignore[arg-type]
    conversations = replace(text, paths=(f"{tmp_path}/chats.jsonl",), format=Format.messages)
    data = DataConfig(
        corpus=text, mixture={"chat": MixedCorpus(corpus=conversations, weight=1)}, main_weight=3, sequence_length=32
    )
    run = replace(
        tiny_run(), sequence_length=data.sequence_length, document_masks=data.document_masks, mixture=data.weights
    )
    store = ArtifactStore(tmp_path / "store")
    corpora = {"corpus": store.make(Stage("corpus", "flows.data.corpus", data.corpora["main"]))}
    corpora["corpus_chat"] = store.make(Stage("corpus_chat", "flows.data.corpus", data.corpora["chat"]))
    made = {
        "tokenizer": store.make(Stage("tokenizer", "flows.data.tokenizer", TokenizerConfig(vocab_size=300), corpora))
    }
    made["tokens"] = store.make(Stage("tokens", "flows.data.encode", data.encoding(), {**corpora, **made}))
    made["baselines"] = store.make(Stage("baselines", "flows.data.baselines", data.weights, {**corpora, **made}))
    inputs = {name: made[name] for name in ("tokens", "tokenizer")}
    made["base"] = store.make(Stage("base", "flows.training.stage", run, inputs))
    return made


def test_the_mixture_is_trained_measured_and_proven(
    made: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, base = made["base"].metrics, made["base"].path
    weights = {"main": 3, "chat": 1}
    dataset = open_split(made["tokens"].path, "train", 32, True, weights)
    seen = dataset.order(0, 12 * 8, 0)
    assert metrics["loss_tokens"] == sum(int((dataset.row(int(i)).targets_L != IGNORED).sum()) for i in seen)
    main = open_split(made["tokens"].path, "train", 32, True)
    assert (seen < len(main)).sum() == 72
    assert metrics["epochs_by_corpus"]["main"] == round(72 / len(main), 3)
    losses = [event["train_loss"] for event in metrics["curve"] if "train_loss" in event]
    assert losses[-1] < losses[0]
    assert math.isfinite(metrics["best_validation_loss"])
    assert json.loads((base / "tokenizer_config.json").read_text())["chat_template"]

    config = QualityConfig(max_tokens=10**5, sequence_length=32, document_masks=True, mixture=weights)
    parents = {name: made[name] for name in ("tokens", "tokenizer")} | {"model": made["base"]}
    (tmp_path / "quality").mkdir()
    measured = quality.build(tmp_path / "quality", config, parents)
    test = open_split(made["tokens"].path, "test", 32, True, weights)
    targets = np.concatenate([test.row(int(i)).targets_L for i in test.first(10**5 // 32)])
    token_bytes = np.load(made["tokenizer"].path / "token_bytes.npy")
    assert measured["tokens"] == (targets != IGNORED).sum()
    assert measured["bytes"] == token_bytes[targets[targets != IGNORED]].sum()
    assert 0 < made["baselines"].metrics["unigram_bits_per_byte"] < 20

    assert receipts.main(["verify", str(base)]) == 0
    assert f"{base.name}: 12 steps, 96 samples, as configured; {metrics['receipt'][:12]}" in capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(base.parent, elsewhere)
    manifest = json.loads((elsewhere / base.name / "manifest.json").read_text())
    manifest["metrics"]["receipt"] = "0" * 64
    (elsewhere / base.name / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ReceiptError, match="says that the chain ends with 000000000000"):
        verify_receipts(elsewhere / base.name)
    shutil.rmtree(elsewhere / made["tokens"].path.name)
    assert receipts.main(["verify", str(elsewhere / base.name)]) == 1
    assert "the tokens that it was trained on, does not exist" in capsys.readouterr().err
    assert receipts.main(["verify", str(made["tokens"].path)]) == 1
    assert "keeps no receipts" in capsys.readouterr().err
    assert load_artifact(base).digest == made["base"].digest
