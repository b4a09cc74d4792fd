"""A masked language model of the transformers library: trained on any ranks, resumed, measured, exported, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from flows.artifact import Artifact
from flows.compression.candidate import count_parameters, load_candidate
from flows.config.compression import QualityConfig
from flows.config.engine import EngineConfig
from flows.config.launcher import LauncherConfig
from flows.config.model import Architecture, Family, ModelConfig
from flows.config.training import TrainingRun
from flows.data.masking import view_of
from flows.data.mixture import open_split
from flows.data.packed import IGNORED
from flows.evaluation import quality
from flows.export import program
from flows.export.runtime import Program
from flows.model import arithmetic
from flows.model.config_json import counted_shape
from flows.model.transformers_model import load_transformers_model
from flows.training.objectives import cross_entropy
from flows.training.schedules import learning_rate
from tests.training.conftest import SEQUENCE_LENGTH, VOCAB_SIZE
from tests.training.interruption import interrupted

Trained = Callable[..., Artifact]
Losses = Callable[[Artifact], list[float]]
Run = Callable[..., TrainingRun]
EPS = torch.finfo(torch.float32).eps
MASK = VOCAB_SIZE - 1
STEPS = 20


@pytest.fixture
def tokenizer(tmp_path: Path) -> Artifact:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    words = {f"w{number}": number for number in range(MASK)} | {"[MASK]": MASK}
    described = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    (directory / "tokenizer.json").write_text(json.dumps(described))
    (directory / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]", "eos_token": "w0"}))
    np.save(directory / "token_bytes.npy", np.array([0] + [2] * (VOCAB_SIZE - 2) + [0]))
    return Artifact("tokenizer", "tokenizer", "tokenizer", directory)


@pytest.fixture
def masked_run(tiny_run: Run, tmp_path: Path) -> Run:
    """Makes runs of a tiny BERT."""

    def run(ranks: int, engine: EngineConfig, dropout: float = 0.0) -> TrainingRun:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
        model = ModelConfig(
            architecture=Architecture.transformers, family=Family.masked_lm, initial_weights=tmp_path / "bert"
        )
        described = tiny_run(
            ranks=ranks,
            micro_batch_size=4 // ranks,
            engine=engine,
            launcher=LauncherConfig(
                num_ranks=ranks, threads_per_rank=1, stall_timeout_s=1200 if engine.compile else 120
            ),
            model=model,
            max_steps=STEPS,
            checkpoint_interval_steps=5,
            eval_interval_steps=STEPS,
            masked_share=0.3,
        )
        return replace(described, document_masks=True)

    return run


def bare_losses(run: TrainingRun, data: dict[str, Artifact], tokenizer: Artifact, dtype: torch.dtype) -> list[float]:
    """The same run without an engine: one process, no accumulation."""
    assert run.model.initial_weights is not None
    torch.set_num_threads(1)
    model = load_transformers_model(run.model.initial_weights).to(dtype).train()
    dataset = open_split(data["tokens"].path, "train", SEQUENCE_LENGTH, True, {})
    shown = view_of(Family.masked_lm, tokenizer.path)
    config, size = run.train.optimizer, run.train.global_batch_size
    update = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    losses = []
    for step in range(STEPS):
        masked = shown(dataset, run.train.masked_share, (run.seed, step))
        rows = [masked.row(int(index)) for index in dataset.order(step * size, size, run.seed)]
        inputs, targets, documents = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        update.zero_grad()
        logits = model(inputs, document_ids_BL=documents)
        hidden = targets != IGNORED
        loss = torch.nn.functional.cross_entropy(logits[hidden], targets[hidden])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.gradient_clipping)
        for group in update.param_groups:
            group["lr"] = learning_rate(run.train, step)
        update.step()
        losses.append(loss.item())
    return losses


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        (1, EngineConfig()),
        (2, EngineConfig(zero_stage=3)),
        pytest.param(1, EngineConfig(compile=True), marks=pytest.mark.exhaustive),
    ],
    ids=["one", "two that share and are interrupted", "compiled"],
)
def test_the_loss_curve_is_that_of_a_bare_loop_and_the_model_is_read_back(
    ranks: int,
    engine: EngineConfig,
    masked_run: Run,
    trained: Trained,
    losses: Losses,
    data: dict[str, Artifact],
    tokenizer: Artifact,
    tmp_path: Path,
) -> None:
    run = masked_run(ranks, engine)
    if ranks == 2:  # the same tokens are hidden when it goes on
        interrupted(lambda: trained(run, tokenizer=tokenizer), tmp_path / "store", "step-00000010")
    artifact = trained(run, tokenizer=tokenizer)
    assert (artifact.metrics["resumed_from_step"] > 0) == (ranks == 2)
    truth, plain = (bare_losses(run, data, tokenizer, dtype) for dtype in (torch.float64, torch.float32))
    noise = max(abs(a - b) for a, b in zip(plain, truth, strict=True))
    worst = max(abs(a - b) for a, b in zip(losses(artifact), truth, strict=True))
    assert worst <= 4 * noise + 4 * EPS * max(truth), f"{worst} against noise {noise}"
    assert truth[-1] < truth[0]

    dataset = open_split(data["tokens"].path, "train", SEQUENCE_LENGTH, True, {})
    seen = dataset.order(0, STEPS * run.train.global_batch_size, run.seed)
    text = [int(((ids != 0) & (ids != MASK)).sum()) for ids in (dataset[int(i)][:-1] for i in seen)]
    assert artifact.metrics["loss_tokens"] == sum(max(1, round(0.3 * count)) for count in text)

    with torch.no_grad():
        ids = torch.randint(1, MASK, (3, 11), generator=torch.Generator().manual_seed(1))
        theirs, report = AutoModelForMaskedLM.from_pretrained(artifact.path, output_loading_info=True)
        assert not any(report.values())
        expected = theirs.eval()(ids).logits
        ours = load_candidate(artifact.path)
        assert (ours(ids) - expected).abs().max() <= 64 * EPS * expected.abs().max()
    assert count_parameters(ours) == artifact.metrics["parameters"] == theirs.num_parameters()
    counted = arithmetic.parameter_count(counted_shape(run.model), VOCAB_SIZE)
    assert counted == pytest.approx(theirs.num_parameters(), rel=0.2), "biases and positions weigh more when tiny"
    if ranks == 1 and not engine.compile:
        assert_measured_and_exported(artifact, data["tokens"], tokenizer, tmp_path)


def assert_measured_and_exported(model: Artifact, tokens: Artifact, tokenizer: Artifact, tmp_path: Path) -> None:
    for name in ("quality", "program"):
        (tmp_path / name).mkdir()
    config = QualityConfig(max_tokens=320, sequence_length=SEQUENCE_LENGTH, document_masks=True)
    parents = {"model": model, "tokens": tokens, "tokenizer": tokenizer}
    measured = quality.build(tmp_path / "quality", config, parents)
    test = view_of(Family.masked_lm, tokenizer.path)(open_split(tokens.path, "test", SEQUENCE_LENGTH, True, {}))
    rows = [test.row(int(index)) for index in test.first(20)]
    inputs, targets, documents = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    candidate = load_candidate(model.path)
    with torch.no_grad():
        summed = float(cross_entropy(candidate(inputs, document_ids_BL=documents), inputs, targets))
    count = int((targets != IGNORED).sum())
    assert measured["tokens"] == count
    assert measured["loss"] == pytest.approx(summed / count, rel=1e-5)
    assert measured["bytes"] == 2 * count
    assert measured["faults"] == []

    exported = program.build(tmp_path / "program", None, {"model": model})
    assert exported["largest_difference"] <= exported["tolerance"]
    ids = np.random.default_rng(0).integers(1, MASK, (4, 9))
    places = np.array([0, 3, 8, 5])
    ids[np.arange(4), places] = MASK
    ids[3, 7] = MASK  # the first one counts
    mask = np.ones_like(ids)
    with torch.no_grad():
        expected = candidate(torch.from_numpy(ids))[torch.arange(4), torch.from_numpy(places)].numpy()
    found = Program(tmp_path / "program").next_token_scores(ids, mask)
    assert np.abs(found - expected).max() <= exported["tolerance"]
    padded, shown = np.pad(ids, ((0, 0), (2, 0)), constant_values=MASK), np.pad(mask, ((0, 0), (2, 0)))
    assert (
        np.abs(Program(tmp_path / "program").next_token_scores(padded, shown) - expected).max()
        <= (exported["tolerance"])
    )


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_a_resumed_run_is_the_same_bit_for_bit(
    masked_run: Run, trained: Trained, losses: Losses, tokenizer: Artifact, tmp_path: Path
) -> None:
    run = masked_run(1, EngineConfig(), dropout=0.1)
    whole = trained(run, tokenizer=tokenizer)
    interrupted(lambda: trained(run, "other", tokenizer=tokenizer), tmp_path / "other", "step-00000010")
    resumed = trained(run, "other", tokenizer=tokenizer)
    assert resumed.metrics["resumed_from_step"] >= 10
    assert losses(resumed) == losses(whole)
    assert resumed.metrics["loss_tokens"] == whole.metrics["loss_tokens"]
    weights = (artifact.path / "model.safetensors" for artifact in (whole, resumed))
    assert len({path.read_bytes() for path in weights}) == 1
