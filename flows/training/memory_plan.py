"""Memory of one rank at its peak, by component, computed from the configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from flows.config.engine import Precision
from flows.config.model import Architecture, Kernels, ModelConfig
from flows.config.training import Objective, TrainingRun
from flows.model import arithmetic
from flows.model.config_json import counted_shape
from flows.training.deepspeed_config import deepspeed_config
from flows.training.trained_weights import TrainedWeights, trained_weights
from kernels.chunk_sizes import CPU_TOKENS, CROSS_ENTROPY_SHARE, DISTILLATION_SHARE, gpu_tokens

FP32_BYTES, BF16_BYTES = 4, 2
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default for `reduce_bucket_size`."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default for `stage3_max_live_parameters`: whole weights that ZeRO-3 keeps gathered at once."""
CPU_RUNTIME_BYTES = 480_000_000
"""Resident memory of a rank whose model is next to nothing: Python, torch, DeepSpeed and what they load on first use;
480 MB measured with the libraries pinned in pyproject.toml."""
CPU_FRAGMENTATION = 0.1
"""Share of what is allocated that the C library's heap holds besides: measured, 0.09 at the quickstart's models."""
GPU_RUNTIME_BYTES = 1_500_000_000
"""CUDA context, NCCL's buffers, cuBLAS's workspace: assumed, between 1 and 2 GB on H100."""
GPU_FRAGMENTATION = 0.05
"""Share of what is allocated that the caching allocator holds besides: assumed."""


@dataclass(frozen=True)
class Layout:
    """How the work is shared among ranks, as far as memory is concerned."""

    dp: int
    """Data-parallel ranks, over which ZeRO partitions."""
    pipeline_stages: int
    tensor_parallel: int
    sequence_parallel: int
    expert_parallel: int
    activation_checkpointing: bool
    zero_stage: int
    optimizer_offloaded: bool
    parameters_offloaded: bool
    bucket_elements: int
    max_live_parameters: int


def layout_of(run: TrainingRun) -> Layout:
    """The layout that a run asks for, raw DeepSpeed keys included."""
    zero: Mapping[str, Any] = deepspeed_config(run)["zero_optimization"]
    return Layout(
        dp=run.dp_size * run.engine.sequence_parallel_size,  # ZeRO shares among both kinds
        pipeline_stages=run.engine.pipeline_stages,
        tensor_parallel=run.engine.tensor_parallel_size,
        sequence_parallel=run.engine.sequence_parallel_size,
        expert_parallel=run.engine.expert_parallel_size,
        activation_checkpointing=run.engine.activation_checkpointing,
        zero_stage=run.engine.zero_stage,
        optimizer_offloaded=_is_offloaded(zero, "offload_optimizer"),
        parameters_offloaded=_is_offloaded(zero, "offload_param"),
        bucket_elements=int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS)),
        max_live_parameters=int(zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS)),
    )


def _is_offloaded(zero: Mapping[str, Any], what: str) -> bool:
    return str((zero.get(what) or {}).get("device", "none")) != "none"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank at its peak."""

    components: dict[str, float]
    """By what holds them, the largest share of the moment when most is held."""
    phase: str
    """When that is: `backward`, `optimizer step` or `writing of text`."""

    @property
    def total_bytes(self) -> float:
        """Everything together."""
        return sum(self.components.values())


def plan_memory(run: TrainingRun, vocab_size: int, is_gpu: bool, teacher: ModelConfig | None = None) -> MemoryPlan:
    """Peak memory of the rank that holds most.

    States as in ZeRO (arXiv:1910.02054, section 3.1 and figure 1), with DeepSpeed's buckets; activations as in
    `flows.model.arithmetic`; the loss as `kernels.head_chunks` computes it.

    Args:
        run: The training run.
        vocab_size: Number of tokens.
        is_gpu: Whether the rank computes on a GPU, whose memory is then meant.
        teacher: The frozen model of a distillation.
    """
    run = replace(run, model=counted_shape(run.model))
    layout = layout_of(run)
    width = FP32_BYTES if run.engine.precision == Precision.fp32 else BF16_BYTES
    held_here, updated_here = _held_share(run.model, vocab_size, layout), _updated_share(run.model, vocab_size, layout)
    counts = trained_weights(run, vocab_size)
    trained = held_here * counts.trained
    gradients = width * (updated_here * counts.trained if layout.zero_stage >= 2 else trained)
    resting = _resting_states(counts, layout, held_here, updated_here, width, is_gpu)
    if teacher is not None:
        resting["teacher"] = FP32_BYTES * arithmetic.parameter_count(teacher, vocab_size)
    backward = resting | {
        "gradients": gradients,
        "communication buckets": _bucket_bytes(layout, trained, width, is_gpu),
        "activations": _activation_bytes(run, layout, width, is_gpu),
        "logits and loss": _loss_bytes(run, vocab_size, layout, is_gpu),
        "features": 0.0 if teacher is None else _feature_bytes(run, teacher),
    }
    step = resting | {
        "gradients": gradients + (FP32_BYTES * updated_here * counts.trained if layout.zero_stage else 0),
        "communication buckets": _bucket_bytes(layout, trained, width, is_gpu),
    }
    writing = resting | {"keys and values": _written_bytes(run, width)}
    phases = {"backward": backward, "optimizer step": step, "writing of text": writing}
    phase, components = max(phases.items(), key=lambda one: sum(one[1].values()))
    held = sum(components.values())
    if is_gpu:
        components |= {"runtime": GPU_RUNTIME_BYTES, "allocator": GPU_FRAGMENTATION * held}
    else:
        components |= {"runtime": CPU_RUNTIME_BYTES, "allocator": CPU_FRAGMENTATION * held}
    return MemoryPlan({name: held for name, held in components.items() if held}, phase)


def update_bytes(run: TrainingRun, vocab_size: int) -> float:
    """Bytes that a rank's optimizer update reads and writes: gradients once, weights and state back and forth."""
    layout = layout_of(run)
    counts = trained_weights(run, vocab_size)
    numbers = counts.trained + 2 * (counts.trained + counts.optimizer_states)
    return FP32_BYTES * numbers * _updated_share(counted_shape(run.model), vocab_size, layout)


def _local_share(model: ModelConfig, vocab_size: int, layout: Layout) -> float:
    """Share of all parameters that the pipeline stage with most of them holds, cut by tensor parallelism."""
    total = arithmetic.parameter_count(model, vocab_size)
    in_layers = model.num_hidden_layers * arithmetic.layer_matrix_count(model)
    return (in_layers / layout.pipeline_stages + total - in_layers) / total / layout.tensor_parallel


def _held_share(model: ModelConfig, vocab_size: int, layout: Layout) -> float:
    """Share of all parameters that a rank computes with: some of the experts, where ranks share those."""
    in_experts = arithmetic.layer_matrix_count(model) - arithmetic.layer_matrix_count(model, experts=0)
    experts = model.num_hidden_layers * in_experts if model.num_experts else 0
    elsewhere = experts / arithmetic.parameter_count(model, vocab_size) * (1 - 1 / layout.expert_parallel)
    return _local_share(model, vocab_size, layout) * (1 - elsewhere)


def _updated_share(model: ModelConfig, vocab_size: int, layout: Layout) -> float:
    """Share of all parameters whose update a rank computes; ZeRO cuts experts over the ranks that hold the same."""
    if layout.zero_stage == 0:
        return _held_share(model, vocab_size, layout)
    return _local_share(model, vocab_size, layout) / layout.dp


def _resting_states(
    counts: TrainedWeights, layout: Layout, held_here: float, updated_here: float, width: int, is_gpu: bool
) -> dict[str, float]:
    """What a rank holds all the time: weights, fp32 masters, optimizer state."""
    weights = width * held_here * counts.all
    if layout.zero_stage == 3:
        own = 0.0 if layout.parameters_offloaded and is_gpu else weights / layout.dp
        weights = own + min(weights, width * layout.max_live_parameters)
    states = FP32_BYTES * updated_here * counts.optimizer_states
    masters = FP32_BYTES * updated_here * counts.trained if layout.zero_stage >= 1 else 0.0
    if layout.optimizer_offloaded and is_gpu:
        states = masters = 0.0
    return {"weights": weights, "fp32 masters": masters, "optimizer states": states}


def _bucket_bytes(layout: Layout, parameters: float, width: int, is_gpu: bool) -> float:
    """DeepSpeed allocates whole buckets; on CPU only the part that is written to becomes resident."""
    if layout.zero_stage == 0:
        return 0.0
    buckets = 2 if layout.zero_stage == 3 else 1  # two where communication overlaps: ZeRO-3's default
    return width * (layout.bucket_elements * buckets if is_gpu else min(layout.bucket_elements, parameters))


def _activation_bytes(run: TrainingRun, layout: Layout, width: int, is_gpu: bool) -> float:
    tokens = run.train.micro_batch_size * run.sequence_length / layout.sequence_parallel
    fused = is_gpu and run.model.kernels != Kernels.reference
    layer = arithmetic.layer_activation_bytes(run.model, width, fused) / layout.tensor_parallel
    layers = run.model.num_hidden_layers / layout.pipeline_stages
    final = arithmetic.norm_activation_bytes(run.model, width, fused)
    in_flight = layout.pipeline_stages  # one forward, one backward: the first stage waits for all others
    if layout.activation_checkpointing:
        return tokens * (in_flight * layers * width * run.model.hidden_size + layer + final)
    return tokens * (in_flight * layers * layer + final)


def _loss_bytes(run: TrainingRun, vocab_size: int, layout: Layout, is_gpu: bool) -> float:
    """Scores of a chunk of tokens, with the log-probabilities that are held against each other where no kernel does it
    in place, and the output projection's gradient. Where the scores of all tokens are made: log-probabilities, their
    gradient and that of the scores; a distillation keeps both models' softened log-probabilities besides, and the
    gradients that meet at the scores."""
    tokens = run.train.micro_batch_size * run.sequence_length / layout.sequence_parallel
    distills, narrow = run.objective == Objective.distillation, run.engine.precision != Precision.fp32
    if not _scores_in_chunks(run):
        arrays = 7 if distills else 3
        return (arrays * FP32_BYTES + narrow * BF16_BYTES) * tokens * vocab_size
    width = run.model.hidden_size
    gradient = FP32_BYTES * vocab_size * width  # of the output projection, before it joins the others
    if is_gpu and run.model.kernels != Kernels.reference:
        own = BF16_BYTES if narrow else FP32_BYTES
        share = DISTILLATION_SHARE if distills else CROSS_ENTROPY_SHARE
        chunk = gpu_tokens(int(tokens), width, own, share)
        return gradient + chunk * vocab_size * (own + (FP32_BYTES if distills else 0))
    arrays = 8 if distills else 3
    return gradient + (arrays * FP32_BYTES + narrow * BF16_BYTES) * min(tokens, CPU_TOKENS) * vocab_size


def _feature_bytes(run: TrainingRun, teacher: ModelConfig) -> float:
    """The teacher's hidden states of each layer that is looked at, both models' in float32 with their difference, and
    of three relations three matrices of all pairs of tokens; see `flows.training.features`."""
    tokens = run.train.micro_batch_size * run.sequence_length
    pairs = run.model.num_hidden_layers if run.hidden.weight else 0
    hidden = pairs * tokens * teacher.hidden_size * 4 * FP32_BYTES
    relations = 3 * 3 * FP32_BYTES * run.relations.heads * tokens * run.sequence_length if run.relations.weight else 0
    return float(hidden + relations)


def _written_bytes(run: TrainingRun, width: int) -> float:
    """Keys and values of all tokens of a micro batch that the student writes."""
    if run.on_policy_share == 0:
        return 0.0
    tokens = run.train.micro_batch_size * (run.generation.prompt_tokens + run.generation.new_tokens)
    model = run.model
    return float(2 * width * tokens * model.num_hidden_layers * model.num_key_value_heads * model.head_dim)


def _scores_in_chunks(run: TrainingRun) -> bool:
    """Whether the scores of all tokens are never made; see `flows.training.objectives.scoring_head`."""
    lora = run.train.lora
    adapted = lora.enabled and any(fnmatchcase("lm_head", pattern) for pattern in lora.targets)
    return run.model.architecture == Architecture.decoder and not adapted
