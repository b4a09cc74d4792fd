"""The chain: which stages there are, in which order, and what each one is made from.

It only describes: whoever calls it decides how a stage runs (as a Prefect task in `flows.train`, bare in the
orchestration benchmark) or does not run at all (`flows.explain`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flows.artifact import Artifact, Stage
from flows.config import Config
from flows.config.data import corpus_role
from flows.config.model import Architecture
from flows.config.steps import BASE, StepKind

RunStage = Callable[[Stage], Artifact]


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
    for name, step in config.steps.items():
        source = models[step.source]
        match step.kind:
            case StepKind.distill:
                start = {"start": models[step.start]} if step.start else {}
                models[name] = run(
                    Stage(name, "flows.training.stage", runs[name], {**data, "teacher": source, **start})
                )
            case StepKind.prune:
                parents = {"model": source, "tokens": tokens}
                models[name] = run(Stage(name, "flows.compression.prune", config.pruning(name), parents))
            case StepKind.quantize:
                settings = config.step_settings(name)
                models[name] = run(Stage(name, "flows.compression.quantize", settings, {"model": source}))

    programs = {
        name: run(Stage(f"{name}_program", "flows.export.program", None, {"model": model}))
        for name, model in models.items()
    }
    compared = {"base": models[BASE], **data}
    qualities = {
        name: run(Stage(f"{name}_quality", "flows.evaluation.quality", config.quality(), {"model": model, **compared}))
        for name, model in models.items()
    }
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
    made_from = {"program": programs[chosen]}
    if config.model.architecture == Architecture.decoder:
        generation = run(Stage("generation", "flows.export.generation", None, {"model": models[chosen]}))
        made_from["generation"] = generation
    entry = run(Stage("entry", "flows.serving.entry", config.entry(), made_from))
    proof = {**data, "entry": entry, "model": models[chosen], "program": programs[chosen]}
    passport = run(Stage("passport", "flows.serving.verify", config.passport(), proof))
    release = {"entry": entry, "passport": passport, "gates": gates}
    published = run(Stage("publish", "flows.serving.publish", config.publish, release))
    everything |= {"entry": entry, "passport": passport, "publish": published}
    report = run(Stage("report", "flows.report.stage", config, everything))
    return ChainResult(gates, report, passport, published)
