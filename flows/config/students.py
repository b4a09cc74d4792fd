"""What several students of one teacher share, what shape they have, and what cannot be theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from flows.config.checks import require
from flows.config.data import Format
from flows.config.distillation import CacheRun, TextRun
from flows.config.json_form import to_plain
from flows.config.model import ModelConfig
from flows.config.steps import StepConfig
from flows.config.training import DistillConfig

if TYPE_CHECKING:
    from flows.config import Config


def student_shape(
    name: str, step: StepConfig, distill: DistillConfig, shapes: Mapping[str, ModelConfig]
) -> ModelConfig:
    """Shape of a student: that of `start`, of its teacher with some of its layers, or `distill.student`.

    Args:
        name: The student's.
        step: How it is made.
        distill: Its settings.
        shapes: Of the candidates before it, by name.

    Raises:
        ConfigError: It is to be made of layers that the teacher lacks, or of two models.
    """
    teacher = shapes[step.source]
    layers = distill.layers_of(teacher.num_hidden_layers)
    if not layers:
        return shapes[step.start] if step.start else distill.student
    chosen = "distill.student_every" if distill.student_every else "distill.student_layers"
    require(
        step.start is None,
        f"steps.{name}.start",
        step.start,
        f"cannot be combined with {chosen}, which says itself where the student's weights come from",
        f"Leave steps.{name}.start or {chosen} out.",
    )
    require(
        layers[-1] < teacher.num_hidden_layers,
        "distill.student_layers",
        list(layers),
        f"names a layer beyond the last of {step.source}, {teacher.num_hidden_layers - 1}",
        f"Set distill.student_layers={list(range(0, teacher.num_hidden_layers, 2))}.",
    )
    kernels = distill.student.kernels
    return replace(teacher, num_hidden_layers=len(layers), kernels=kernels, initial_weights=None)


def teacher_caches(config: Config) -> dict[str, CacheRun]:
    """The cache of each teacher that has one, by the teacher's name: enough for the longest of its students."""
    caches: dict[str, CacheRun] = {}
    for name, run in config.training_runs().items():
        if not run.cache_top_k:
            continue
        teacher, wanted = config.steps[name].source, run.train.max_steps * run.train.global_batch_size
        before = caches.get(teacher)
        if before is not None:
            require(
                before.top_k == run.cache_top_k,
                f"steps.{name}.settings.cache.top_k",
                run.cache_top_k,
                f"is not the {before.top_k} of another student of {teacher}, and a teacher has one cache",
                "Set distill.cache.top_k for all of them.",
            )
            wanted = max(wanted, before.sequences)
        caches[teacher] = CacheRun(
            top_k=run.cache_top_k,
            sequences=wanted,
            sequence_length=run.sequence_length,
            seed=run.seed,
            document_masks=run.document_masks,
            mixture=run.mixture,
        )
    return caches


def teacher_texts(config: Config) -> dict[str, TextRun]:
    """What each teacher writes for its students, by the teacher's name."""
    texts: dict[str, TextRun] = {}
    for name, distill in _distillations(config):
        if not distill.teacher_sequences:
            continue
        teacher = config.steps[name].source
        text = TextRun(
            sequences=distill.teacher_sequences,
            generation=distill.generation,
            sequence_length=config.data.sequence_length,
            seed=config.seed,
            document_masks=config.data.document_masks,
        )
        require(
            texts.setdefault(teacher, text) == text,
            f"steps.{name}.settings",
            to_plain(text.generation) | {"teacher_sequences": text.sequences},
            f"is not what another student of {teacher} reads, and a teacher writes one text",
            "Set distill.teacher_sequences and distill.generation for all of them.",
        )
    return texts


def reads_teacher_text(config: Config, name: str) -> bool:
    """Whether a student is trained on what its teacher wrote."""
    return any(distill.teacher_sequences > 0 for student, distill in _distillations(config) if student == name)


def check_students(config: Config) -> None:
    """Raises `ConfigError` where students of one teacher contradict each other, or their data."""
    teacher_caches(config)
    teacher_texts(config)
    for _, distill in _distillations(config):
        for field_name in ("teacher_sequences", "on_policy_share"):
            value = getattr(distill, field_name)
            require(
                not value or all(corpus.format == Format.text for corpus in config.data.corpora.values()),
                f"distill.{field_name}",
                value,
                "cannot be combined with conversations: beginnings are cut from plain text",
                f"Set distill.{field_name}=0, or data.corpus.format=text.",
            )
        require(
            not (distill.teacher_sequences and config.data.weights),
            "distill.teacher_sequences",
            distill.teacher_sequences,
            "cannot be combined with data.mixture: what is written is one corpus",
            "Set distill.teacher_sequences=0, or data=files.",
        )
        given, length = distill.generation.prompt_tokens, config.data.sequence_length
        require(
            not (distill.teacher_sequences or distill.on_policy_share)
            or given + distill.generation.new_tokens - 1 <= length,
            "distill.generation.new_tokens",
            distill.generation.new_tokens,
            f"after distill.generation.prompt_tokens={given} is more than data.sequence_length={length} has room for",
            f"Set distill.generation.new_tokens={max(1, length + 1 - given)}, or fewer prompt_tokens.",
        )


def _distillations(config: Config) -> Iterator[tuple[str, DistillConfig]]:
    for name in config.trained_candidates[1:]:
        settings = config.step_settings(name)
        assert isinstance(settings, DistillConfig)
        yield name, settings
