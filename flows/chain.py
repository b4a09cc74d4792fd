"""The chain: which stages there are, in which order, and what each one is made from.

It only describes: whoever calls it decides how a stage runs (as a Prefect task in `flows.train_flow`, bare in the
orchestration benchmark) or does not run at all (`look_along`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from flows.artifact import Artifact, Stage
from flows.config import Config
from flows.config.data import corpus_role
from flows.config.model import Architecture
from flows.config.steps import BASE, StepKind
from flows.config.students import reads_teacher_text, teacher_caches, teacher_texts

RunStage = Callable[[Stage], Artifact]


class _EnoughError(Exception):
    """Whoever looks along the chain has seen enough."""


@dataclass(frozen=True)
class ChainResult:
    """What came out at the end."""

    gates: Artifact
    report: Artifact
    passport: Artifact | None = None
    published: Artifact | None = None
    """None: no candidate passed the gates."""


def run_chain(config: Config, run: RunStage) -> ChainResult:
    """Runs every stage from raw data to the report, each with the outputs of those before it.

    Args:
        config: The run.
        run: Turns a stage into its artifact; raises if it fails.
    """
    corpora = {}
    for name, corpus in config.data.corpora.items():
        role = corpus_role(name)
        corpora[role] = run(Stage(role, "flows.data.corpus", corpus))
    tokenizer = run(Stage("tokenizer", "flows.data.tokenizer", config.data.tokenizer, corpora))
    tokens = run(Stage("tokens", "flows.data.encode", config.data.encoding(), {**corpora, "tokenizer": tokenizer}))
    data = {"tokens": tokens, "tokenizer": tokenizer}
    baselines = run(Stage("baselines", "flows.data.baselines", config.data.weights or None, {**data, **corpora}))

    runs = config.training_runs()
    models = {BASE: run(Stage(BASE, "flows.training.stage", runs[BASE], data))}
    lessons: dict[str, Artifact] = {}
    for name, step in config.steps.items():
        source = models[step.source]
        match step.kind:
            case StepKind.distill:
                start = {"start": models[step.start]} if step.start else {}
                left = _left_by_teacher(config, name, {**data, "teacher": source}, lessons, run)
                parents = {**data, "teacher": source, **start, **left}
                models[name] = run(Stage(name, "flows.training.stage", runs[name], parents))
            case StepKind.prune:
                parents = {"model": source, "tokens": tokens}
                models[name] = run(Stage(name, "flows.compression.prune", config.pruning(name), parents))
            case StepKind.quantize:
                quantizing = config.quantizing(name)
                parents = {"model": source} | ({"tokens": tokens} if quantizing.quantize.needs_data else {})
                models[name] = run(Stage(name, "flows.compression.quantize", quantizing, parents))

    programs = {
        name: run(Stage(f"{name}_program", "flows.export.program", None, {"model": model}))
        for name, model in models.items()
    }
    qualities: dict[str, Artifact] = {}
    for name, model in models.items():  # the base model first
        compared = {"base": models[BASE], "base_quality": qualities[BASE]} if qualities else {}
        parents = {"model": model, **compared, **data}
        qualities[name] = run(Stage(f"{name}_quality", "flows.evaluation.quality_stage", config.quality(), parents))
    latency = run(Stage("latency", "flows.evaluation.latency", config.evaluate.latency, programs))
    measured = {
        **{f"quality:{name}": quality for name, quality in qualities.items()},
        **{f"program:{name}": program for name, program in programs.items()},
        "latency": latency,
        "baselines": baselines,
    }
    gates = run(Stage("gates", "flows.evaluation.gates", config.gating(), measured))

    everything = {**data, **corpora, **models, **measured, "gates": gates}
    chosen = gates.metrics["chosen"]
    if chosen is None:
        return ChainResult(gates, run(Stage("report", "flows.report.stage", config, everything)))
    program = programs[chosen]
    if config.export.pipeline_stages > 1:
        program = run(Stage("split", "flows.export.split", config.split(), {"model": models[chosen]}))
    made_from = {"program": program}
    if config.model.architecture == Architecture.decoder:
        generation = run(Stage("generation", "flows.export.generation", config.generation(), {"model": models[chosen]}))
        made_from["generation"] = generation
    entry = run(Stage("entry", "flows.serving.entry", config.entry(), made_from))
    proof = {**data, "entry": entry, "model": models[chosen], "program": program}
    passport = run(Stage("passport", "flows.serving.proof.verify_stage", config.passport(), proof))
    release = {"entry": entry, "passport": passport, "gates": gates}
    published = run(Stage("publish", "flows.serving.publish", config.publish, release))
    everything |= {"entry": entry, "passport": passport, "publish": published}
    if program is not programs[chosen]:
        everything["split"] = program
    report = run(Stage("report", "flows.report.stage", config, everything))
    return ChainResult(gates, report, passport, published)


def look_along(config: Config, look: Callable[[Stage], Artifact | None]) -> None:
    """Goes along the chain for what earlier runs have left, in the order in which the stages would run; runs nothing.

    Args:
        config: The run.
        look: The artifact of a stage; None ends the walk, as what follows cannot be told or is not asked for.
    """

    def run(stage: Stage) -> Artifact:
        found = look(stage)
        if found is None:
            raise _EnoughError
        return found

    with suppress(_EnoughError):
        run_chain(config, run)


def _left_by_teacher(
    config: Config, name: str, made_from: Mapping[str, Artifact], lessons: dict[str, Artifact], run: RunStage
) -> dict[str, Artifact]:
    """What a student's teacher leaves it before it trains, by role: its cache, its text; made once for all students.

    Args:
        config: The run.
        name: The student's.
        made_from: Teacher and data.
        lessons: What teachers have left before, by stage; added to.
        run: As in `run_chain`.
    """
    teacher = config.steps[name].source
    left: dict[str, Artifact] = {}
    if config.training_runs()[name].cache_top_k:
        stage = f"{teacher}_teacher_cache"
        if stage not in lessons:
            section = teacher_caches(config)[teacher]
            lessons[stage] = run(Stage(stage, "flows.training.teacher_cache", section, made_from))
        left["cache"] = lessons[stage]
    if reads_teacher_text(config, name):
        stage = f"{teacher}_teacher_text"
        if stage not in lessons:
            written = teacher_texts(config)[teacher]
            lessons[stage] = run(Stage(stage, "flows.training.teacher_text", written, made_from))
        left |= {"tokens": lessons[stage], "validation": made_from["tokens"]}
    return left
