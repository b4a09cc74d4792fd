"""What a student learns of its teacher besides next-token scores, what is kept of those, and whose text it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from flows.config.checks import require, require_positive

if TYPE_CHECKING:
    from flows.config.model import ModelConfig
    from flows.config.training import TrainingRun


class Divergence(StrEnum):
    """How a student's distribution is held against its teacher's."""

    forward_kl = "forward_kl"
    """KL(teacher || student), which covers all that the teacher expects."""
    reverse_kl = "reverse_kl"
    """KL(student || teacher), which stays within it."""
    jsd = "jsd"
    """The generalized Jensen-Shannon divergence, between them (arXiv:2306.13649)."""


class Distance(StrEnum):
    """How hidden states are held against each other: mean of squared differences, or one minus the cosine."""

    mse = "mse"
    cosine = "cosine"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The teacher's distributions, computed once for all its students, so that training holds no teacher."""

    top_k: int = 0
    """Likeliest tokens whose log-probabilities are kept for each training token, with the sum of all others; 0 = no
    cache."""

    def __post_init__(self) -> None:
        require(
            self.top_k >= 0,
            "distill.cache.top_k",
            self.top_k,
            "must not be negative",
            "Set distill.cache.top_k=64, or 0 for no cache.",
        )


@dataclass(frozen=True, kw_only=True)
class HiddenConfig:
    """The residual stream after a student's layers is to be the teacher's (arXiv:1909.10351)."""

    weight: float = 0.0
    """Of this term, a mean over layers and tokens, beside the others; 0 = none."""
    layers: tuple[int, ...] = ()
    """Teacher layer, from 0 on, for each layer of the student; empty = spread evenly, the last one to the last."""
    distance: Distance = Distance.mse
    """`mse`: mean of squared differences; `cosine`: one minus the cosine. Where widths differ, a projection of the
    student's states is trained with it and dropped afterwards."""

    def __post_init__(self) -> None:
        _require_weight("distill.hidden.weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class RelationsConfig:
    """Which tokens' queries, keys and values are alike is to be as in the teacher (MiniLMv2, arXiv:2012.15828)."""

    weight: float = 0.0
    """Of this term, a mean of three relations over heads and tokens, beside the others; 0 = none."""
    heads: int = 4
    """Relation heads that queries, keys and values are cut into, whatever attention heads there are."""
    layer: int = -1
    """Teacher layer that the student's last one is held against, from 0 on, or from the end: -1 is the last."""

    def __post_init__(self) -> None:
        _require_weight("distill.relations.weight", self.weight)
        require_positive("distill.relations", self, ["heads"])


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Text that a model writes: it goes on from the beginnings of training sequences."""

    prompt_tokens: int = 32
    """Tokens of a training sequence that are given."""
    new_tokens: int = 96
    """Tokens that are written, fewer where the text ends."""
    temperature: float = 1.0
    """1 draws as the model expects, 0 takes the likeliest token."""

    def __post_init__(self) -> None:
        require_positive("distill.generation", self, ["prompt_tokens", "new_tokens"])
        require(
            self.temperature >= 0,
            "distill.generation.temperature",
            self.temperature,
            "must not be negative",
            "Set distill.generation.temperature=1, or 0 for the likeliest tokens.",
        )


@dataclass(frozen=True, kw_only=True)
class CacheRun:
    """What a teacher cache depends on besides the teacher and the tokens: no temperature, and no student."""

    top_k: int
    sequences: int
    """Positions of the stream of training sequences, from its beginning, whose sequences are in it."""
    sequence_length: int
    seed: int
    """Of the order of that stream."""
    document_masks: bool = False
    mixture: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextRun:
    """What a teacher's text depends on besides the teacher and the tokens."""

    sequences: int
    """Texts to write."""
    generation: GenerationConfig
    sequence_length: int
    seed: int
    document_masks: bool = False


def check_distillation(run: TrainingRun) -> None:
    """Raises `ConfigError` for a kind of distillation that the run's engine cannot do, or that contradicts another."""
    _check_cache(run)
    engine = run.engine
    alone: dict[str, tuple[object, object]] = {
        "engine.pipeline_stages": (engine.pipeline_stages, 1),
        "engine.tensor_parallel_size": (engine.tensor_parallel_size, 1),
        "engine.sequence_parallel_size": (engine.sequence_parallel_size, 1),
        f"{run.model_section}.num_experts": (run.model.num_experts, 0),
        "engine.compile": (engine.compile, False),
    }
    kinds: dict[str, tuple[float, dict[str, tuple[object, object]]]] = {
        "hidden.weight": (run.hidden.weight, alone),
        "relations.weight": (
            run.relations.weight,
            alone | {"engine.activation_checkpointing": (engine.activation_checkpointing, False)},
        ),
        "on_policy_share": (
            run.on_policy_share,
            alone | {"engine.zero_stage": (engine.zero_stage, min(engine.zero_stage, 2))},
        ),
    }
    for kind, (value, needs) in kinds.items():
        for field_name, (found, only) in needs.items():
            require(
                not value or found == only,
                field_name,
                found,
                f"cannot be combined with distill.{kind}={value}: a rank needs whole layers and sequences at hand",
                f"Set {field_name}={str(only).lower()}, or distill.{kind}=0.",
            )


def _check_cache(run: TrainingRun) -> None:
    top_k = run.cache_top_k
    if not top_k:
        return
    needs_teacher = {
        "distill.hidden.weight": run.hidden.weight,
        "distill.relations.weight": run.relations.weight,
        "distill.on_policy_share": run.on_policy_share,
    }
    for field_name, value in needs_teacher.items():
        require(
            value == 0,
            field_name,
            value,
            f"cannot be combined with distill.cache.top_k={top_k}: it needs the teacher itself, not what was kept of "
            "its scores",
            f"Set distill.cache.top_k=0, or {field_name}=0.",
        )
    require(
        run.temperature >= 1,
        "distill.temperature",
        run.temperature,
        f"must be 1 or more with distill.cache.top_k={top_k}: what is kept of the other tokens tells how they flatten, "
        "not how they sharpen",
        "Set distill.temperature=1, or distill.cache.top_k=0.",
    )
    require(
        run.alpha > 0,
        "distill.cache.top_k",
        top_k,
        "is of no use with distill.alpha=0, which asks no teacher",
        "Set distill.cache.top_k=0, or distill.alpha=0.5.",
    )
    require(
        run.engine.pipeline_stages == 1,
        "engine.pipeline_stages",
        run.engine.pipeline_stages,
        f"cannot be combined with distill.cache.top_k={top_k}: stages hand on no cached scores",
        "Set engine.pipeline_stages=1, or distill.cache.top_k=0.",
    )


def check_against_teacher(run: TrainingRun, teacher: ModelConfig, name: str) -> None:
    """Raises `ConfigError` where a student's layers and widths do not fit what it is to learn of its teacher.

    Args:
        run: The student's training.
        teacher: Shape of the teacher.
        name: The teacher's, for messages.
    """
    has, mapped = teacher.num_hidden_layers, run.hidden.layers
    if run.hidden.weight and mapped:
        require(
            len(mapped) == run.model.num_hidden_layers and all(0 <= layer < has for layer in mapped),
            "distill.hidden.layers",
            list(mapped),
            f"must name a layer of {name}, 0 to {has - 1}, for each of the student's {run.model.num_hidden_layers}",
            f"Set distill.hidden.layers={list(spread_layers(run.model.num_hidden_layers, has))}, or [].",
        )
    if not run.relations.weight:
        return
    require(
        -has <= run.relations.layer < has,
        "distill.relations.layer",
        run.relations.layer,
        f"must be a layer of {name}, which has {has}",
        "Set distill.relations.layer=-1, the last.",
    )
    heads = run.relations.heads
    for owner, shape in {"the student": run.model, name: teacher}.items():
        for kind, count in {"queries": shape.num_attention_heads, "keys and values": shape.num_key_value_heads}.items():
            require(
                count * shape.head_dim % heads == 0,
                "distill.relations.heads",
                heads,
                f"must divide the {count * shape.head_dim} numbers that {kind} of {owner} have",
                f"Set distill.relations.heads={shape.num_key_value_heads}.",
            )


def spread_layers(students: int, teachers: int) -> tuple[int, ...]:
    """Teacher layer for each of the student's, evenly spread, the last one to the last (arXiv:1909.10351)."""
    return tuple(-(-(layer + 1) * teachers // students) - 1 for layer in range(students))


def _require_weight(field_name: str, weight: float) -> None:
    require(weight >= 0, field_name, weight, "must not be negative", f"Set {field_name}=1, or 0 for none.")
