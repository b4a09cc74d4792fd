"""A small learnable corpus of token ids, and runs on it in real ranks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.config.engine import EngineConfig
from flows.config.launcher import LauncherConfig
from flows.config.model import ModelConfig
from flows.config.optimizer import OptimizerConfig
from flows.config.tracking import TrackingConfig
from flows.config.training import Objective, TrainConfig, TrainingRun
from tests.training.preloaded_ranks import popen, start_server

VOCAB_SIZE = 64
SEQUENCE_LENGTH = 16
TINY = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


@pytest.fixture(scope="session", autouse=True)
def _server_of_ranks() -> None:
    start_server()


@pytest.fixture(scope="module", autouse=True)
def _preloaded_ranks() -> Iterator[None]:
    """Ranks are forked from a process that has done the imports; other tests start them as users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """`tokens` and `tokenizer` artifacts: arithmetic sequences modulo the vocabulary."""
    directory = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(0)
    splits = {}
    for split, documents in {"train": 200, "validation": 20, "test": 20}.items():
        ids, starts = [], []
        for _ in range(documents):
            starts.append(len(ids))
            first, stride = generator.integers(1, VOCAB_SIZE), generator.integers(1, 3)
            ids += [int((first + stride * i) % (VOCAB_SIZE - 1)) + 1 for i in range(40)] + [0]
        np.asarray(ids, dtype="<u2").tofile(directory / f"{split}-00000.bin")
        np.save(directory / f"{split}-00000.documents.npy", np.asarray(starts, dtype=np.int64))
        splits[split] = {
            "tokens": len(ids),
            "documents": documents,
            "bytes": len(ids),
            "shards": [{"file": f"{split}-00000.bin", "tokens": len(ids), "documents": documents}],
        }
    index = {"dtype": "uint16", "vocab_size": VOCAB_SIZE, "eos_token_id": 0, "splits": splits}
    (directory / "index.json").write_text(json.dumps(index))
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    (tokenizer / "tokenizer.json").write_text("{}")
    return {
        "tokens": Artifact("tokens", "tokens", "tokens", directory),
        "tokenizer": Artifact("tokenizer", "tokenizer", "tokenizer", tokenizer),
    }


def tiny_run(
    *,
    ranks: int = 1,
    micro_batch_size: int = 4,
    engine: EngineConfig | None = None,
    launcher: LauncherConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    model: ModelConfig = TINY,
    objective: Objective = Objective.cross_entropy,
    temperature: float = 1.0,
    alpha: float = 1.0,
    **train: Any,
) -> TrainingRun:
    """A run of seconds; its clip value binds, so that a wrong gradient norm shows."""
    settings: dict[str, Any] = {
        "max_steps": 12,
        "warmup_steps": 3,
        "gradient_clipping": 0.3,
        "log_interval_steps": 1,
        "eval_interval_steps": 6,
        "eval_tokens": 320,
        "checkpoint_interval_steps": 6,
    }
    return TrainingRun(
        objective=objective,
        model=model,
        train=TrainConfig(
            global_batch_size=8,
            micro_batch_size=micro_batch_size,
            optimizer=optimizer or OptimizerConfig(learning_rate=1e-2),
            **(settings | train),
        ),
        engine=engine or EngineConfig(),
        launcher=launcher or LauncherConfig(num_ranks=ranks, threads_per_rank=1, stall_timeout_s=120),
        tracking=TrackingConfig(tensorboard=False),
        sequence_length=SEQUENCE_LENGTH,
        seed=0,
        temperature=temperature,
        alpha=alpha,
    )


@pytest.fixture(name="tiny_run")
def tiny_run_fixture() -> Callable[..., TrainingRun]:
    return tiny_run


@pytest.fixture
def trained(tmp_path: Path, data: dict[str, Artifact]) -> Callable[..., Artifact]:
    """Trains in real ranks and returns the artifact; `directory` names the store."""

    def run(config: TrainingRun, store: str = "store", **parents: Artifact) -> Artifact:
        return ArtifactStore(tmp_path / store).make(Stage("base", "flows.training.stage", config, data | parents))

    return run


@pytest.fixture
def losses() -> Callable[[Artifact], list[float]]:
    """Training losses of an artifact, one per step."""
    return lambda artifact: [event["train_loss"] for event in artifact.metrics["curve"] if "train_loss" in event]
