"""When DeepSpeed leaves the gradients to AdamW's kernel, and what it is then told not to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flows.artifact import Artifact
from flows.config import ConfigError
from flows.config.engine import EngineConfig, Offload, Precision
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.launcher import RankError
from flows.training.deepspeed_config import can_clip_in_update, deepspeed_config, without_clipping
from tests.training.conftest import TINY, tiny_run


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("sequence_parallel_size", [1, 2])
def test_where_ranks_share_data_alone_the_kernel_clips(stage: int, sequence_parallel_size: int) -> None:
    engine = EngineConfig(zero_stage=stage, sequence_parallel_size=sequence_parallel_size)
    assert can_clip_in_update(tiny_run(ranks=2, engine=engine))


@pytest.mark.parametrize(
    "engine",
    [
        {"zero_stage": 3},
        {"offload_optimizer": Offload.cpu},
        {"pipeline_stages": 2},
        {"tensor_parallel_size": 2},
        {"deepspeed": {"fp16": {"enabled": True}}},
        {"deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}},
        {"deepspeed": {"torch_autocast": {"enabled": True}}},
        {"deepspeed": {"zero_optimization": {"zenflow": {}}}},
    ],
    ids=str,
)
def test_what_needs_deepspeeds_norm_keeps_it(engine: dict[str, Any]) -> None:
    assert not can_clip_in_update(tiny_run(ranks=2, engine=EngineConfig(**engine)))


def test_other_optimizers_and_experts_keep_it() -> None:
    assert not can_clip_in_update(tiny_run(optimizer=OptimizerConfig(name=Optimizer.lion)))
    assert not can_clip_in_update(replace(tiny_run(), model=replace(TINY, num_experts=4)))


def test_no_pass_over_the_gradients_is_left() -> None:
    settings = deepspeed_config(tiny_run(engine=EngineConfig(zero_stage=2, precision=Precision.bf16)))
    without = without_clipping(settings)
    assert without["gradient_clipping"] == 0.0
    assert without["zero_optimization"] == {"stage": 2, "compute_grad_norm": False}
    assert without["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert without_clipping(deepspeed_config(tiny_run(engine=EngineConfig(zero_stage=0))))["zero_optimization"] == {
        "stage": 0  # without ZeRO it would be an error
    }
    assert settings["gradient_clipping"] == 0.3


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("optimizer", "train.optimizer"),
        ("scheduler", "train.schedule"),
        ("train_batch_size", "train.global_batch_size"),
        ("activation_checkpointing", "engine.activation_checkpointing"),
    ],
)
def test_a_raw_key_that_changes_nothing_is_refused(key: str, setting: str) -> None:
    run = tiny_run(engine=EngineConfig(deepspeed={key: {"type": "SGD"}}))
    with pytest.raises(ConfigError, match=rf"engine.deepspeed.{key}=.* would not be read: .* set {setting}"):
        deepspeed_config(run)


def test_what_deepspeed_refuses_is_said_without_a_traceback(trained: Callable[..., Artifact]) -> None:
    with pytest.raises(RankError, match=r"with engine.deepspeed=\{'graph_harvesting': True\}: Graph .* Remove what"):
        trained(tiny_run(engine=EngineConfig(deepspeed={"graph_harvesting": True})))
