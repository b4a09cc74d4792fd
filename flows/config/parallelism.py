"""What a run's engine, model and ranks ask of each other."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from flows.config.checks import require
from flows.config.engine import Precision
from flows.config.model import Architecture

if TYPE_CHECKING:
    from flows.config.training import TrainingRun


def check_parallelism(run: TrainingRun) -> None:
    """Raises `ConfigError` for a combination that cannot run, or that DeepSpeed 0.19 runs wrongly without saying so."""
    _check_ranks(run)
    _check_pipeline(run)
    _check_shares(run)
    _check_experts(run)
    _check_kind_of_training(run)
    _check_fp8(run)
    _check_quantization_aware(run)


def _check_ranks(run: TrainingRun) -> None:
    engine, ranks = run.engine, run.launcher.world_size
    need = engine.ranks_per_replica
    require(
        ranks % need == 0,
        "launcher.num_ranks",
        run.launcher.num_ranks,
        (f"x launcher.num_nodes={run.launcher.num_nodes} " if run.launcher.num_nodes > 1 else "")
        + f"must be a multiple of engine.pipeline_stages={engine.pipeline_stages} x "
        f"engine.tensor_parallel_size={engine.tensor_parallel_size} x "
        f"engine.sequence_parallel_size={engine.sequence_parallel_size} = {need}",
        f"Set launcher.num_ranks={need * max(1, round(run.launcher.num_ranks / need))}.",
    )


def _check_pipeline(run: TrainingRun) -> None:
    stages, model = run.engine.pipeline_stages, run.model_section
    if stages == 1:
        return
    require(
        stages <= run.model.num_hidden_layers,
        "engine.pipeline_stages",
        stages,
        f"must not exceed {model}.num_hidden_layers={run.model.num_hidden_layers}: each stage holds a layer or more",
        f"Set engine.pipeline_stages={run.model.num_hidden_layers}.",
    )
    require(
        run.engine.zero_stage == 1 or run.train.gradient_clipping == 0,
        "engine.zero_stage",
        run.engine.zero_stage,
        f"cannot be combined with engine.pipeline_stages={stages} and "
        f"{run.train_section}.gradient_clipping={run.train.gradient_clipping}: DeepSpeed 0.19 then clips by the "
        "gradient norm of the first stage alone",
        "Set engine.zero_stage=1.",
    )


def _check_shares(run: TrainingRun) -> None:
    model, section = run.model, run.model_section
    tensor, sequence = run.engine.tensor_parallel_size, run.engine.sequence_parallel_size
    field = "tensor_parallel_size" if tensor > 1 else "sequence_parallel_size"
    require(
        model.num_key_value_heads % (tensor * sequence) == 0,
        f"engine.{field}",
        getattr(run.engine, field),
        (f"x engine.sequence_parallel_size={sequence} " if tensor > 1 and sequence > 1 else "")
        + f"must divide {section}.num_key_value_heads={model.num_key_value_heads}: each rank has whole heads",
        f"Set {section}.num_key_value_heads={tensor * sequence}, or fewer ranks.",
    )
    require(
        model.intermediate_size % tensor == 0,
        "engine.tensor_parallel_size",
        tensor,
        f"must divide {section}.intermediate_size={model.intermediate_size}",
        f"Set engine.tensor_parallel_size={_divisor(model.intermediate_size, tensor)}.",
    )
    require(
        run.sequence_length % sequence == 0,
        "engine.sequence_parallel_size",
        sequence,
        f"must divide data.sequence_length={run.sequence_length}",
        f"Set engine.sequence_parallel_size={_divisor(run.sequence_length, sequence)}.",
    )


def _check_experts(run: TrainingRun) -> None:
    engine, model, section = run.engine, run.model, run.model_section
    size, experts = engine.expert_parallel_size, model.num_experts
    if experts == 0:
        require(
            size == 1 or run.objective == "distillation",  # the teacher may have experts
            "engine.expert_parallel_size",
            size,
            f"needs experts to share, and {section}.num_experts=0",
            f"Set {section}.num_experts={4 * size}, or engine.expert_parallel_size=1.",
        )
        return
    for field, only in NOT_WITH_EXPERTS.items():
        value = getattr(engine, field)
        require(
            value in only,
            f"engine.{field}",
            value,
            f"cannot be combined with {section}.num_experts={experts}: mixtures of experts are shared among "
            "data-parallel ranks, and only with ZeRO 0-2 has DeepSpeed 0.19 been shown right with them",
            f"Set engine.{field}={only[-1]}.",
        )
    for name, whole in ((f"{section}.num_experts", experts), ("the number of data-parallel ranks", run.dp_size)):
        require(
            whole % size == 0,
            "engine.expert_parallel_size",
            size,
            f"must divide {name}, {whole}",
            f"Set engine.expert_parallel_size={_divisor(whole, size)}.",
        )
    require(
        size == 1 or engine.zero_stage > 0 or run.train.gradient_clipping == 0,
        "engine.zero_stage",
        engine.zero_stage,
        f"cannot be combined with engine.expert_parallel_size={size} and "
        f"{run.train_section}.gradient_clipping={run.train.gradient_clipping}: DeepSpeed 0.19 then takes the mean of "
        "the ranks' gradient norms for the norm",
        "Set engine.zero_stage=1.",
    )


def _check_kind_of_training(run: TrainingRun) -> None:
    engine, model, train = run.engine, run.model, run.train
    ours = {
        "engine.pipeline_stages": engine.pipeline_stages,
        "engine.tensor_parallel_size": engine.tensor_parallel_size,
        "engine.sequence_parallel_size": engine.sequence_parallel_size,
        "engine.activation_checkpointing": engine.activation_checkpointing,
    }
    for field, value in ours.items():
        require(
            model.architecture == "decoder" or value in (1, False),
            field,
            value,
            f"cannot be combined with {run.model_section}.architecture={model.architecture}: only our decoder has it",
            f"Set {field}={'false' if isinstance(value, bool) else 1}.",
        )
    tensor = engine.tensor_parallel_size
    require(
        tensor == 1 or not (model.qkv_bias or model.qk_norm),
        "engine.tensor_parallel_size",
        tensor,
        f"cannot be combined with {run.model_section}.qkv_bias or qk_norm, whose weights DeepSpeed 0.19 does not cut",
        "Set engine.tensor_parallel_size=1.",
    )
    cut = {
        "engine.pipeline_stages": engine.pipeline_stages,
        "engine.tensor_parallel_size": tensor,
        f"{run.model_section}.num_experts": max(1, model.num_experts),
    }
    whole = {
        "optimizer.name": train.optimizer.name if train.optimizer.name == "muon" else None,
        "lora.rank": train.lora.rank if train.lora.enabled else None,
        "trainable": list(train.trainable) or None,
        "freeze": list(train.freeze) or None,
    }
    _check_zeros(run)
    for field, parts in cut.items():
        for name, chosen in whole.items():
            require(
                parts == 1 or chosen is None or name in SHOWN_RIGHT.get(field, ()),
                f"{run.train_section}.{name}",
                chosen,
                f"cannot be combined with {field}={parts}: it has been shown right where every rank has all weights, "
                "or an even part of each",
                f"Train with adamw and all weights, or without {field}.",
            )
    require(
        engine.pipeline_stages == 1
        or not train.lora.enabled
        or not any(fnmatchcase("lm_head", pattern) for pattern in train.lora.targets),
        f"{run.train_section}.lora.targets",
        list(train.lora.targets),
        f"cannot be combined with engine.pipeline_stages={engine.pipeline_stages} where it names lm_head: the last "
        "stage computes its loss from the matrix of the output projection, past an adapter",
        f"Leave lm_head out, or name it in {run.train_section}.lora.replaced.",
    )


def _check_fp8(run: TrainingRun) -> None:
    if run.engine.precision != Precision.fp8:
        return
    model, section = run.model, run.model_section
    without = {
        f"{section}.architecture": (model.architecture, Architecture.decoder),
        f"{section}.num_experts": (model.num_experts, 0),
        f"{run.train_section}.lora.rank": (run.train.lora.rank, 0),
    }
    for field, (value, only) in without.items():
        require(
            value == only,
            field,
            value,
            "cannot be combined with engine.precision=fp8, which knows our decoder's linear layers only",
            f"Set engine.precision=bf16, or {field}={only}.",
        )
    tokens = run.train.micro_batch_size * run.sequence_length // run.engine.sequence_parallel_size
    sizes = {
        f"{section}.hidden_size": model.hidden_size,
        f"{section}.intermediate_size": model.intermediate_size,
        f"{section}.num_attention_heads x head width": model.num_attention_heads * model.head_dim,
        f"{section}.num_key_value_heads x head width": model.num_key_value_heads * model.head_dim,
        f"{run.train_section}.micro_batch_size x tokens of a sequence on a rank": tokens,
    }
    for field, size in sizes.items():
        require(
            size % FP8_MULTIPLE == 0,
            field,
            size,
            f"must be a multiple of {FP8_MULTIPLE} for engine.precision=fp8: GPUs multiply fp8 in tiles of so many",
            f"Make it {FP8_MULTIPLE * max(1, round(size / FP8_MULTIPLE))}, or set engine.precision=bf16.",
        )


def _check_zeros(run: TrainingRun) -> None:
    engine, train = run.engine, run.train
    shown_right: dict[str, tuple[object, object]] = {
        "engine.tensor_parallel_size": (engine.tensor_parallel_size, 1),
        f"{run.train_section}.optimizer.name": (
            train.optimizer.name,
            "adamw" if train.optimizer.name == "muon" else train.optimizer.name,
        ),
        f"{run.train_section}.lora.rank": (train.lora.rank, 0),
    }
    if train.sparsify.sparsity:
        shown_right["engine.pipeline_stages"] = (engine.pipeline_stages, 1)
        shown_right[f"{run.model_section}.num_experts"] = (run.model.num_experts, 0)
        shown_right[f"{run.model_section}.architecture"] = (run.model.architecture, Architecture.decoder)
    kept = f"the sparse {run.start} to start from" if run.keep_zeros and run.start else None
    growing = f"{run.train_section}.sparsify.sparsity={train.sparsify.sparsity:g}" if train.sparsify.sparsity else None
    for field, (value, only) in shown_right.items():
        require(
            not (kept or growing) or value == only,
            field,
            value,
            f"cannot be combined with {growing or kept}: its zeros would not stay zeros",
            f"Set {field}={only}, or prune after the training.",
        )


def _check_quantization_aware(run: TrainingRun) -> None:
    config, engine = run.train.quantization_aware, run.engine
    if config.scheme is None:
        return
    field = f"{run.train_section}.quantization_aware.scheme"
    for name in ("pipeline_stages", "tensor_parallel_size"):
        require(
            getattr(engine, name) == 1,
            field,
            config.scheme,
            f"cannot be combined with engine.{name}={getattr(engine, name)}: a matrix is rounded by the rank that has "
            "all of it",
            f"Set engine.{name}=1 and share the work by engine.zero_stage=3.",
        )
    require(
        engine.precision == Precision.fp32,
        field,
        config.scheme,
        f"cannot be combined with engine.precision={engine.precision}: codes would be trained that those of the saved "
        "float32 weights differ from",
        "Set engine.precision=fp32.",
    )
    require(
        run.model.num_experts == 0 and run.model.architecture == Architecture.decoder,
        field,
        config.scheme,
        f"needs a decoder without experts, and {run.model_section} has num_experts={run.model.num_experts}, "
        f"architecture={run.model.architecture}",
        f"Set {field}=null.",
    )
    require(
        not run.train.lora.enabled,
        field,
        config.scheme,
        f"cannot be combined with {run.train_section}.lora.rank={run.train.lora.rank}: what adapters change is not "
        "rounded",
        f"Set {run.train_section}.lora.rank=0.",
    )
    heads = run.model.num_attention_heads * run.model.head_dim
    for width in (run.model.hidden_size, run.model.intermediate_size, heads):
        require(
            config.bits == 8 or width % config.group_size == 0,
            f"{run.train_section}.quantization_aware.group_size",
            config.group_size,
            f"must divide the {width} columns of a matrix of {run.model_section}",
            f"Set a width that is a multiple of {config.group_size}.",
        )


FP8_MULTIPLE = 16
NOT_WITH_EXPERTS: dict[str, tuple[object, ...]] = {
    "zero_stage": (0, 2, 1),
    "pipeline_stages": (1,),
    "tensor_parallel_size": (1,),
    "sequence_parallel_size": (1,),
    "compile": (False,),
}
"""Values that have been shown right with mixtures of experts; the last is the remedy."""
SHOWN_RIGHT = {
    "engine.pipeline_stages": ("lora.rank", "trainable", "freeze"),
    "engine.tensor_parallel_size": ("trainable", "freeze"),
}
"""Kinds of training that go together with a way to cut the model."""


def _divisor(number: int, at_most: int) -> int:
    """Largest divisor of `number` up to `at_most`."""
    return max(divisor for divisor in range(1, at_most + 1) if number % divisor == 0)
