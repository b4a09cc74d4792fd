"""Combinations drawn by chance: whatever validation admits gives what one process gives, taken up by another layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flows.artifact import Artifact
from flows.config import ConfigError, to_json
from flows.config.distillation import CacheRun, Divergence, HiddenConfig, RelationsConfig
from flows.config.engine import EngineConfig, Offload
from flows.config.lora import LoraConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.quantization_aware import QuantizationAwareConfig
from flows.config.sparsify import SparsifyConfig
from flows.config.training import Objective, TrainingRun
from flows.launcher import launch_ranks
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize
from flows.model.transformers_model import model_without_weights
from flows.training import teacher_cache
from flows.training.job import TrainingJob
from flows.training.metrics_log import METRICS, read_metrics
from flows.training.stage import resumable_as
from flows.training.trainable import choose_weights
from tests.training.bare_run import BareRun, bare_run
from tests.training.conftest import SEQUENCE_LENGTH, TINY, VOCAB_SIZE, tiny_run
from tests.training.test_optimizers import RATES
from tests.training.test_parity import EPS, EXPERTS, PIPELINE, SEQUENCE, TENSOR

STEPS, SPLIT = 6, 3
DRAWS = (5, 6, 7, 9, 11, 14, 17, 18, 19, 21, 22)
"""Between them: each way to share a model and each kind of training, in a minute; any other number is as good."""
WAYS: list[dict[str, Any]] = [{}, {}, PIPELINE, PIPELINE, TENSOR, TENSOR, SEQUENCE, {**PIPELINE, **SEQUENCE}]
FREEZE: list[dict[str, Any]] = [
    {"freeze": ("model.layers.0.*",)},
    {"freeze": ("*norm*",)},
    {"freeze": ("model.embed_tokens.weight",)},
    {"trainable": ("*.mlp.*",)},
    {"lora": LoraConfig(rank=4, alpha=8.0)},
    {"lora": LoraConfig(rank=4, alpha=8.0, targets=("*.self_attn.?_proj",), replaced=("*norm",))},
]
TAUGHT: list[dict[str, Any]] = [
    {"temperature": 2.0, "alpha": 0.7},
    {"temperature": 1.0, "alpha": 0.5, "divergence": Divergence.jsd},
    {"alpha": 0.7, "cache_top_k": 8},
    {"alpha": 0.7, "hidden": HiddenConfig(weight=1.0)},
    {"alpha": 0.0, "relations": RelationsConfig(weight=1.0, heads=2)},
]


def layout(random: Random) -> tuple[int, int, dict[str, Any]]:
    """Ranks, micro batch and engine."""
    engine = dict(random.choice(WAYS))
    engine["zero_stage"] = 1 if "pipeline_stages" in engine else random.choice([0, 1, 2, 3, 3])
    engine["activation_checkpointing"] = random.random() < 0.3
    engine["offload_optimizer"] = Offload.cpu if random.random() < 0.3 else Offload.none
    return random.choice([1, 2, 2, 2, 4]), random.choice([1, 2, 4]), engine


def drawn(random: Random, weights_dir: Path) -> tuple[TrainingRun, TrainingRun]:
    """A run that validation admits, and the same one in another layout."""
    while True:
        try:
            run = _draw(random, weights_dir)
            other = None
            while other is None or resumable_as(other) != resumable_as(run):
                other = _in_layout(run, *layout(random))
            return run, other
        except ConfigError:
            continue


def _in_layout(run: TrainingRun, ranks: int, micro_batch_size: int, engine: dict[str, Any]) -> TrainingRun | None:
    try:
        other = replace(
            run,
            engine=EngineConfig(**engine, deepspeed=run.engine.deepspeed),
            launcher=replace(run.launcher, num_ranks=ranks),
            train=replace(run.train, micro_batch_size=micro_batch_size),
        )
        with torch.device("meta"):
            choose_weights(model_without_weights(other.model), other.train, 0, other.engine.pipeline_stages)
        return other
    except ConfigError:
        return None


def _draw(random: Random, weights_dir: Path) -> TrainingRun:
    def maybe(share: float) -> bool:
        return random.random() < share

    ranks, micro_batch_size, engine = layout(random)
    model = replace(TINY, num_key_value_heads=random.choice([2, 4]), tie_word_embeddings=maybe(0.6))
    if maybe(0.2):
        model = replace(model, **EXPERTS)
        engine["expert_parallel_size"] = random.choice([1, 2])
    rule = random.choice([*Optimizer, Optimizer.adamw, Optimizer.adamw])
    train: dict[str, Any] = {"ema_decay": 0.8 if maybe(0.3) else 0.0, "asynchronous_checkpoints": maybe(0.5)}
    if maybe(0.5):
        train |= random.choice(FREEZE)
    if "lora" in train:
        model = replace(TINY, initial_weights=weights_dir)
    if maybe(0.15):
        train["quantization_aware"] = QuantizationAwareConfig(scheme=random.choice(["w4a16", "w8a8"]))
    if maybe(0.15):
        train["sparsify"] = SparsifyConfig(sparsity=0.5, end_step=4, interval_steps=2)
    # so that a model of this size is cut into several parts, and ZeRO-3 keeps none of its weights at hand
    small = {"sub_group_size": 1500, "reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0}
    run = tiny_run(
        ranks=ranks,
        micro_batch_size=micro_batch_size,
        engine=EngineConfig(**engine, deepspeed={"zero_optimization": small}),
        model=replace(model, intermediate_size=64),
        optimizer=OptimizerConfig(name=rule, learning_rate=RATES[rule], decay_embeddings=maybe(0.5), momentum=0.5),
        max_steps=STEPS,
        warmup_steps=1,
        gradient_clipping=random.choice([0.3, 0.0]),
        eval_interval_steps=STEPS,
        checkpoint_interval_steps=SPLIT,
        keep_checkpoints=2,
        **train,
    )
    run = replace(run, seed=random.randrange(100), document_masks=maybe(0.5))
    if maybe(0.35):
        run = replace(run, objective=Objective.distillation, **random.choice(TAUGHT))
    found = _in_layout(run, ranks, micro_batch_size, engine)
    return found if found is not None else _draw(random, weights_dir)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Artifact]) -> dict[str, Path]:
    """Directories: `start` of a model to adapt, `teacher` of another width."""
    shapes = {"start": replace(TINY, intermediate_size=64), "teacher": replace(TINY, hidden_size=64)}
    made = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        made[name] = tmp_path_factory.mktemp(name)
        model = Decoder(shape, VOCAB_SIZE)
        initialize(model, seed)
        save_decoder(made[name], dict(model.named_parameters()), shape, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
        shutil.copy(data["tokenizer"].path / "tokenizer.json", made[name])
    return made


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("number", DRAWS)
def test_what_is_admitted_gives_the_run_of_one_process(
    number: int,
    decoders: dict[str, Path],
    data: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as a rank would; the one process is none
    run, other = drawn(Random(number), decoders["start"])
    print(to_json(run), to_json(other.engine))
    job = job_of(run, decoders["teacher"], data, tmp_path)
    truth, plain = bare_run(job, torch.float64), bare_run(job)
    rounds = run.train.quantization_aware.scheme is not None
    first = trained(job, run)
    assert_same(first, truth, plain, rounds)
    shutil.rmtree(job.checkpoint_dir / f"step-{STEPS:08d}")
    shutil.rmtree(job.best_dir)
    again = trained(job, other)
    assert again["summary"]["resumed_from_step"] == SPLIT
    assert again["losses"][:SPLIT] == first["losses"][:SPLIT]
    assert_same(again, truth, plain, rounds)
    for name in ("receipt", "loss_tokens", "trainable_parameters"):
        assert again["summary"][name] == first["summary"][name]


def job_of(run: TrainingRun, teacher_dir: Path, data: dict[str, Artifact], directory: Path) -> TrainingJob:
    """The job, with the teacher or its cache where the run needs one."""
    cache_dir = None
    if run.cache_top_k:
        section = CacheRun(
            top_k=run.cache_top_k,
            sequences=STEPS * run.train.global_batch_size,
            sequence_length=run.sequence_length,
            seed=run.seed,
            document_masks=run.document_masks,
        )
        cache_dir = directory / "cache"
        cache_dir.mkdir()
        teacher_cache.build(cache_dir, section, {**data, "teacher": Artifact("base", "base", "base", teacher_dir)})
    return TrainingJob(
        run=run,
        directory=directory / "model",
        tokens_dir=data["tokens"].path,
        tokens_digest=data["tokens"].digest,
        tokenizer_dir=data["tokenizer"].path,
        teacher_dir=teacher_dir if run.runs_teacher else None,
        cache_dir=cache_dir,
    )


def trained(job: TrainingJob, run: TrainingRun) -> dict[str, Any]:
    """Runs the job in ranks, from its newest checkpoint if there is one."""
    job.log_dir.mkdir(parents=True, exist_ok=True)
    path = job.log_dir / "run.json"
    path.write_text(to_json(replace(job, run=run)))
    launch_ranks("flows.training", path, run.launcher, job.log_dir)
    events = list(read_metrics(job.log_dir / METRICS))
    return {
        "losses": [event["train_loss"] for event in events if "train_loss" in event],
        "norms": [event.get("grad_norm") for event in events if "train_loss" in event],
        "validation_loss": events[-1]["validation_loss"],
        "weights": load_file(job.best_dir / "model.safetensors"),
        "summary": json.loads((job.log_dir / "summary.json").read_text()),
    }


def assert_same(got: dict[str, Any], truth: BareRun, plain: BareRun, rounds: bool) -> None:
    """Within some times what float32 itself costs one process against float64, plus rounding."""
    noise = max(abs(a - b) for a, b in zip(plain.losses, truth.losses, strict=True))
    rounding = 4 * EPS * max(truth.losses)
    worst = max(abs(a - b) for a, b in zip(got["losses"], truth.losses, strict=True))
    if rounds:  # an error of rounding may tip a code over the edge between two
        assert worst <= 1e-3 * max(truth.losses)
        return
    assert worst <= 4 * noise + rounding
    last = max(noise, abs(plain.validation_loss - truth.validation_loss))
    assert abs(got["validation_loss"] - truth.validation_loss) <= 4 * last + 8 * rounding
    norm_noise = max(abs(a - b) for a, b in zip(plain.norms, truth.norms, strict=True))
    norms = [(a, b) for a, b in zip(got["norms"], truth.norms, strict=True) if a is not None]
    assert all(abs(a - b) <= 4 * norm_noise + 32 * EPS * max(truth.norms) for a, b in norms)
    # of all weights: that of a single tensor is one draw, and may be a small one
    weight_noise = max((plain.weights[name] - weight).abs().max().item() for name, weight in truth.weights.items())
    assert truth.weights.keys() - {"lm_head.weight"} == got["weights"].keys() - {"lm_head.weight"}
    for name, weight in got["weights"].items():
        expected = truth.weights[name]
        assert (weight - expected).abs().max() <= 8 * weight_noise + 4 * EPS * expected.abs().max(), name
        assert torch.equal(weight == 0, plain.weights[name] == 0), name
