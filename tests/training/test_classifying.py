"""A model that classifies: trained on any ranks like a bare loop, interrupted, measured, exported, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from flows.artifact import Artifact
from flows.config.compression import QualityConfig
from flows.config.engine import EngineConfig
from flows.config.model import Architecture, Family, ModelConfig
from flows.config.training import TrainingRun
from flows.data.macro_f1 import macro_f1
from flows.data.mixture import open_split
from flows.evaluation import quality
from flows.export import program
from flows.export.runtime import Program
from flows.model.transformers_model import load_transformers_model
from flows.training import objectives
from flows.training.batches import to_batch
from flows.training.objectives import LossModule
from flows.training.schedules import learning_rate
from tests.training.conftest import SEQUENCE_LENGTH, VOCAB_SIZE
from tests.training.interruption import interrupted

Trained = Callable[..., Artifact]
Losses = Callable[[Artifact], list[float]]
Run = Callable[..., TrainingRun]
EPS = torch.finfo(torch.float32).eps
LABELS = ["low", "middle", "high"]
STEPS = 20


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Artifact]:
    """Texts of tokens from one third of the vocabulary, which is their label."""
    directory = tmp_path / "tokens"
    directory.mkdir()
    generator = np.random.default_rng(0)
    splits = {}
    for split, texts in {"train": 96, "validation": 24, "test": 30}.items():
        labels = generator.integers(3, size=texts)
        parts = [
            np.append(1 + 21 * label + generator.integers(21, size=generator.integers(3, SEQUENCE_LENGTH)), 0)
            for label in labels
        ]
        ids = np.concatenate(parts)
        ids.astype("<u2").tofile(directory / f"{split}-00000.bin")
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        np.save(directory / f"{split}-00000.documents.npy", starts)
        np.save(directory / f"{split}-00000.labels.npy", labels)
        shards = [{"file": f"{split}-00000.bin", "tokens": len(ids), "documents": texts}]
        splits[split] = {"tokens": len(ids), "documents": texts, "bytes": len(ids), "shards": shards}
    index = {"dtype": "uint16", "vocab_size": VOCAB_SIZE, "eos_token_id": 0, "labels": LABELS, "splits": splits}
    (directory / "index.json").write_text(json.dumps(index))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    np.save(tokenizer / "token_bytes.npy", np.ones(VOCAB_SIZE, np.int64))
    return {
        "tokens": Artifact("tokens", "tokens", "tokens", directory),
        "tokenizer": Artifact("tokenizer", "tokenizer", "tokenizer", tokenizer),
    }


@pytest.fixture
def classifying_run(tiny_run: Run, tmp_path: Path) -> Run:
    """Makes runs of a tiny BERT without dropout, which has drawn its head before."""

    def run(ranks: int, engine: EngineConfig) -> TrainingRun:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=SEQUENCE_LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(LABELS)),
        )
        BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
        return tiny_run(
            ranks=ranks,
            micro_batch_size=4 // ranks,
            engine=engine,
            model=ModelConfig(
                architecture=Architecture.transformers,
                family=Family.sequence_classification,
                initial_weights=tmp_path / "bert",
            ),
            max_steps=STEPS,
            checkpoint_interval_steps=5,
            eval_interval_steps=STEPS,
        )

    return run


def bare_losses(run: TrainingRun, data: dict[str, Artifact], dtype: torch.dtype) -> list[float]:
    """The same run of the library's model without an engine: one process, no accumulation."""
    torch.set_num_threads(1)
    model = BertForSequenceClassification.from_pretrained(run.model.initial_weights).to(dtype).train()
    dataset = open_split(data["tokens"].path, "train", SEQUENCE_LENGTH)
    config, size = run.train.optimizer, run.train.global_batch_size
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == is_matrix] for is_matrix in (True, False))
    update = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    losses = []
    for step in range(STEPS):
        rows = [dataset.row(int(index)) for index in dataset.order(step * size, size, run.seed)]
        inputs, labels, fills = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        update.zero_grad()
        loss = cross_entropy(model(inputs, attention_mask=1 - fills).logits, labels[:, 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.gradient_clipping)
        for group in update.param_groups:
            group["lr"] = learning_rate(run.train, step)
        update.step()
        losses.append(loss.item())
    return losses


def test_loss_and_measures_are_those_of_the_library(
    classifying_run: Run, data: dict[str, Artifact], tmp_path: Path
) -> None:
    directory = classifying_run(1, EngineConfig()).model.initial_weights
    theirs = BertForSequenceClassification.from_pretrained(directory).eval()
    dataset = open_split(data["tokens"].path, "train", SEQUENCE_LENGTH)
    batch = to_batch([dataset.row(index) for index in range(5)], "cpu")
    assert batch.document_ids_BL is not None
    with torch.no_grad():
        loss = LossModule(load_transformers_model(directory), objectives.cross_entropy).eval()(*batch)
        scores = theirs(batch.input_ids_BL, attention_mask=1 - batch.document_ids_BL).logits
    assert loss.item() == pytest.approx(float(cross_entropy(scores, batch.targets_BL[:, 0])), rel=1e-5)
    assert_measured(Artifact("base", "base", "base", directory), theirs, data, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "engine"),
    [(1, EngineConfig()), (2, EngineConfig(zero_stage=3))],
    ids=["one", "two that share and are interrupted"],
)
def test_the_loss_curve_is_that_of_a_bare_loop_and_the_model_is_read_back(
    ranks: int,
    engine: EngineConfig,
    classifying_run: Run,
    trained: Trained,
    losses: Losses,
    data: dict[str, Artifact],
    tmp_path: Path,
) -> None:
    run = classifying_run(ranks, engine)
    if ranks == 2:
        interrupted(lambda: trained(run), tmp_path / "store", "step-00000010")
    artifact = trained(run)
    truth, plain = (bare_losses(run, data, dtype) for dtype in (torch.float64, torch.float32))
    noise = max(abs(a - b) for a, b in zip(plain, truth, strict=True))
    worst = max(abs(a - b) for a, b in zip(losses(artifact), truth, strict=True))
    assert worst <= 4 * noise + 4 * EPS * max(truth), f"{worst} against noise {noise}"
    assert truth[-1] < truth[0]
    assert artifact.metrics["loss_tokens"] == STEPS * run.train.global_batch_size, "one label a text"

    theirs, report = BertForSequenceClassification.from_pretrained(artifact.path, output_loading_info=True)
    assert not any(report.values())
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert_measured(artifact, theirs.eval(), data, tmp_path)


@torch.no_grad()
def assert_measured(
    model: Artifact, theirs: BertForSequenceClassification, data: dict[str, Artifact], tmp_path: Path
) -> None:
    (tmp_path / "quality").mkdir()
    config = QualityConfig(max_tokens=10**6, sequence_length=SEQUENCE_LENGTH)
    measured = quality.build(tmp_path / "quality", config, {"model": model, **data})
    test = open_split(data["tokens"].path, "test", SEQUENCE_LENGTH)
    rows = [test.row(index) for index in range(len(test))]
    inputs, labels, fills = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    scores = theirs(inputs, attention_mask=1 - fills).logits
    assert measured["loss"] == pytest.approx(float(cross_entropy(scores, labels[:, 0])), rel=1e-5)
    found = scores.argmax(-1)
    assert measured["accuracy"] == pytest.approx(float((found == labels[:, 0]).float().mean()))
    confusion = np.zeros((3, 3), np.int64)
    np.add.at(confusion, (labels[:, 0].numpy(), found.numpy()), 1)
    assert measured["macro_f1"] == pytest.approx(macro_f1(confusion))
    assert [measured["by_label"][name]["texts"] for name in LABELS] == confusion.sum(1).tolist()
    assert (measured["tokens"], measured["bits_per_byte"], measured["bytes"]) == (30, None, None)
    assert measured["faults"] == []


@pytest.mark.exhaustive
@torch.no_grad()
def test_the_program_gives_the_librarys_scores_with_any_padding(classifying_run: Run, tmp_path: Path) -> None:
    directory = classifying_run(1, EngineConfig()).model.initial_weights
    (directory / "tokenizer.json").write_text("{}")
    (tmp_path / "program").mkdir()
    exported = program.build(tmp_path / "program", None, {"model": Artifact("base", "base", "base", directory)})
    assert 0 < exported["largest_difference"] <= exported["tolerance"]
    theirs = BertForSequenceClassification.from_pretrained(directory).eval()
    ids = np.random.default_rng(0).integers(1, VOCAB_SIZE, (4, 9))
    expected = theirs(torch.from_numpy(ids)).logits.numpy()
    for left, right in ((0, 0), (2, 0), (0, 5), (3, 1)):
        padded, mask = (np.pad(x, ((0, 0), (left, right)), constant_values=0) for x in (ids, np.ones_like(ids)))
        found = Program(tmp_path / "program").next_token_scores(padded, mask)
        assert found.shape == (4, len(LABELS))
        assert np.abs(found - expected).max() <= exported["tolerance"]
