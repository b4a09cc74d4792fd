"""What cannot run together, or would train wrongly without saying so, is refused with its rule and remedy."""

from __future__ import annotations

import pytest

from flows.compose import compose_config
from flows.config import ConfigError

REFUSED = {
    "launcher.num_ranks=3 engine.pipeline_stages=2": (
        r"launcher.num_ranks=3 must be a multiple of engine.pipeline_stages=2 x engine.tensor_parallel_size=1 x "
        r"engine.sequence_parallel_size=1 = 2. Set launcher.num_ranks=4"
    ),
    "launcher=two_ranks engine.pipeline_stages=2 engine.zero_stage=3": (
        r"engine.zero_stage=3 cannot be combined with engine.pipeline_stages=2: pipeline parallelism shards layers and "
        r"supports ZeRO 0-1. Set engine.zero_stage=1, or engine.pipeline_stages=1."
    ),
    "launcher=two_ranks engine=zero0 engine.pipeline_stages=2": (
        r"engine.zero_stage=0 cannot be combined with engine.pipeline_stages=2 and train.gradient_clipping=1.0: "
        r"DeepSpeed 0.19 then clips by the gradient norm of the first stage alone. Set engine.zero_stage=1"
    ),
    "launcher.num_ranks=8 engine.pipeline_stages=8": (
        r"engine.pipeline_stages=8 must not exceed model.num_hidden_layers=4: .* Set engine.pipeline_stages=4"
    ),
    "launcher=four_ranks engine.pipeline_stages=2 engine.tensor_parallel_size=2": (
        r"engine.pipeline_stages=2 cannot be combined with engine.tensor_parallel_size=2: DeepSpeed 0.19's pipeline "
        r"stages wait for collectives .* Set engine.pipeline_stages=1 or engine.tensor_parallel_size=1"
    ),
    "launcher=four_ranks engine.tensor_parallel_size=4": (
        r"engine.tensor_parallel_size=4 must divide model.num_key_value_heads=2: each rank has whole heads. Set"
    ),
    "launcher=four_ranks engine.sequence_parallel_size=4": (
        r"engine.sequence_parallel_size=4 must divide model.num_key_value_heads=2"
    ),
    "launcher=four_ranks engine.tensor_parallel_size=2 engine.sequence_parallel_size=2": (
        r"engine.tensor_parallel_size=2 x engine.sequence_parallel_size=2 must divide model.num_key_value_heads=2"
    ),
    "launcher=two_ranks engine.tensor_parallel_size=2 model.intermediate_size=687": (
        r"engine.tensor_parallel_size=2 must divide model.intermediate_size=687. Set engine.tensor_parallel_size=1"
    ),
    "launcher=two_ranks engine.sequence_parallel_size=2 data.sequence_length=255": (
        r"engine.sequence_parallel_size=2 must divide data.sequence_length=255"
    ),
    "launcher=two_ranks engine.pipeline_stages=2 distill.student.num_hidden_layers=1": (
        r"engine.pipeline_stages=2 must not exceed distill.student.num_hidden_layers=1"
    ),
    "engine=zero0 engine.offload_optimizer=cpu": (
        r"engine.offload_optimizer=cpu cannot be combined with engine.zero_stage=0: it needs ZeRO 1, 2 or 3"
    ),
    "engine.offload_optimizer=cpu model.kernels=triton": (
        r"model.kernels=triton cannot be combined with engine.offload_optimizer=cpu: AdamW .* Set model.kernels=auto, "
        r"or engine.offload_optimizer=none."
    ),
    "engine=zero2 engine.offload_optimizer=nvme engine.nvme_path=/tmp": (
        r"engine.offload_optimizer=nvme cannot be combined with engine.zero_stage=2: .* Set engine.zero_stage=3"
    ),
    "engine=zero2 engine.offload_parameters=cpu": (
        r"engine.offload_parameters=cpu cannot be combined with engine.zero_stage=2: only ZeRO-3 fetches weights"
    ),
    "engine=zero3 engine.offload_parameters=nvme engine.nvme_path=/tmp": (
        r"engine.offload_parameters=nvme is not supported: DeepSpeed 0.19 .* Set engine.offload_parameters=cpu"
    ),
    "engine=zero3 engine.offload_optimizer=nvme": r"engine.nvme_path=None must be given exactly if .* Set engine.nvme",
    "engine.nvme_path=/tmp": r"engine.nvme_path=/tmp must be given exactly if optimizer state is offloaded to nvme",
    "engine=zero0 engine.precision=fp8": r"engine.precision=fp8 cannot be combined with engine.zero_stage=0",
    "launcher=two_ranks engine=tensor2 engine.precision=fp8": (
        r"engine.precision=fp8 cannot be combined with engine.tensor_parallel_size=2: .* Set engine.precision=bf16"
    ),
    "engine.precision=fp8 model.num_experts=4": r"model.num_experts=4 cannot be combined with engine.precision=fp8",
    "engine.precision=fp8 model.intermediate_size=680": (
        r"model.intermediate_size=680 must be a multiple of 16 for engine.precision=fp8: .* Make it 672"
    ),
    "engine.precision=fp8 data.sequence_length=129 evaluate.latency.tokens=8 train.micro_batch_size=4": (
        r"train.micro_batch_size x tokens of a sequence on a rank=516 must be a multiple of 16 for engine.precision=fp8"
    ),
    "engine=zero0 engine.precision=bf16": r"engine.precision=bf16 cannot be combined with engine.zero_stage=0",
    "launcher=two_ranks engine=pipeline2 train.lora.rank=4 train.lora.targets=[*head] model.initial_weights=x "
    "data.tokenizer.directory=x": (
        r"train.lora.targets=\['\*head'\] cannot be combined with engine.pipeline_stages=2 where it names lm_head: the "
        r"last stage .* or name it in train.lora.replaced"
    ),
    "launcher=two_ranks engine=tensor2 train.lora.rank=4 model.initial_weights=x data.tokenizer.directory=x": (
        r"train.lora.rank=4 cannot be combined with engine.tensor_parallel_size=2: .* Train with adamw and all weights"
    ),
    "model.num_experts=4 train.freeze=[*norm*]": (
        r"train.freeze=\['\*norm\*'\] cannot be combined with model.num_experts=4"
    ),
    "engine.pipeline_stages=0": r"engine.pipeline_stages=0 must be greater than 0",
    "launcher=two_ranks train.global_batch_size=24": (
        r"train.global_batch_size=24 must be a multiple of train.micro_batch_size=8 x 2 data-parallel ranks = 16. Set "
    ),
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_the_refused_are_told_why(overrides: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[overrides]):
        compose_config(overrides.split())


def test_ranks_that_share_a_model_make_one_data_parallel_rank() -> None:
    shared = "launcher.num_ranks=8 engine.sequence_parallel_size=2 engine.pipeline_stages=2 train.global_batch_size=32"
    run = compose_config(shared.split()).training_runs()["base"]
    assert run.dp_size == 2
    assert run.gradient_accumulation_steps == 2
