"""What is kept on NVMe trains, is saved and taken up like what is kept in memory; and is refused where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.artifact import Artifact
from flows.config import RunError
from flows.config.engine import EngineConfig, Offload
from flows.config.model import ModelConfig
from flows.config.training import TrainingRun
from flows.training.nvme import reserve, unavailable_reason
from tests.training.interruption import interrupted
from tests.training.test_parity import assert_same_curve, assert_saved_weights_are_the_measured_ones

Run = Callable[..., TrainingRun]
WIDE = ModelConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
"""Its matrices take more than the MiB below which DeepSpeed keeps them in memory; its norms and embedding less."""


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    reason = unavailable_reason(tmp_path / "none", "cpu")
    assert reason == f"{tmp_path / 'none'} is no directory that can be written to. Make it, or name another one"


def test_two_runs_do_not_share_files(tmp_path: Path) -> None:
    with reserve(tmp_path, rank=0), reserve(tmp_path, rank=1), pytest.raises(RunError, match="in use by another run"):
        reserve(tmp_path, rank=1)
    reserve(tmp_path, rank=1).close()


@pytest.mark.exhaustive
def test_without_libaio_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPATH", "CFLAGS", "LIBRARY_PATH", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    monkeypatch.setenv("CC", "no-compiler")
    assert "Run apt-get install g++ ninja-build libaio-dev, or offload to cpu" in str(
        unavailable_reason(tmp_path, "cpu")
    )


@pytest.fixture
def nvme(tmp_path: Path) -> Path:
    directory = tmp_path / "nvme"
    directory.mkdir()
    if reason := unavailable_reason(directory, "cpu"):
        pytest.skip(reason)
    return directory


@pytest.mark.exhaustive
@pytest.mark.parametrize("ema_decay", [0.0, 0.9], ids=["", "averaged"])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_nvme_is_taken_up_from_memory_and_memory_from_nvme(
    asynchronous: bool,
    ema_decay: float,
    nvme: Path,
    trained: Callable[..., Artifact],
    losses: Callable[[Artifact], list[float]],
    tiny_run: Run,
    data: dict[str, Artifact],
    tmp_path: Path,
) -> None:
    def run_of(**engine: Any) -> TrainingRun:
        run = tiny_run(
            engine=EngineConfig(zero_stage=3, **engine),
            model=WIDE,
            max_steps=30,
            checkpoint_interval_steps=5,
            eval_interval_steps=15,
            asynchronous_checkpoints=asynchronous,
            ema_decay=ema_decay,
        )
        return replace(run, launcher=replace(run.launcher, stall_timeout_s=900))  # it may compile first

    on_nvme, in_memory = run_of(offload_optimizer=Offload.nvme, nvme_path=nvme), run_of()
    interrupted(lambda: trained(in_memory), tmp_path / "store", "step-00000005")
    interrupted(lambda: trained(on_nvme), tmp_path / "store", "step-00000015")
    assert [*nvme.rglob("optimizer/**/*.swp")], "nothing was kept there"
    for artifact in (trained(in_memory), trained(on_nvme, store="nvme")):
        assert_same_curve(losses(artifact), on_nvme, data)
        assert_saved_weights_are_the_measured_ones(artifact, on_nvme, data)
