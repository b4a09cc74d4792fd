"""The report: one page of HTML that holds all that it shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flows.artifact import Artifact
from flows.config import Config, to_plain
from flows.config.model import Family
from flows.config.quantize import QuantizeConfig
from flows.config.steps import StepKind
from flows.config.training import Objective, TrainingRun
from flows.report import number_format, tables
from flows.report.figures import SERIES, Curve, Point, bars, curves, plane
from flows.report.lineage import draw_lineage

TEMPLATES = Path(__file__).parent
TEMPLATE = "report.html.jinja"
STYLE_SHEET = "report.css"
FIGURE_SIZE = (390.0, 250.0)
WIDE_FIGURE_SIZE = (800.0, 270.0)


def render(config: Config, parents: Mapping[str, Artifact]) -> str:
    """The page.

    Args:
        config: The run.
        parents: By role: `corpus`, `tokenizer`, `tokens`, `baselines`, every candidate by its name, `quality:<name>`,
            `program:<name>`, `latency`, `gates`, and if something was published `entry`, `passport`, `publish`.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(number_format, name) for name in ("size", "count", "duration", "significant")}
    metrics = {role: artifact.metrics for role, artifact in parents.items()}
    passport = json.loads((parents["passport"].path / "passport.json").read_text()) if "passport" in parents else None
    series, grids = _series(config), tables.sparsity_grids
    defaults, chosen_settings = (tables.settings(to_plain(one)) for one in (Config(), config))
    return environment.get_template(TEMPLATE).render(
        style=Markup((TEMPLATES / STYLE_SHEET).read_text()),
        config=config,
        metrics=metrics,
        rows=metrics["gates"]["candidates"],
        chosen=next((row for row in metrics["gates"]["candidates"] if row["name"] == metrics["gates"]["chosen"]), None),
        series=series,
        figures=candidate_figures(config, metrics) | _training_figures(config, metrics),
        descents=tables.descents(config.steps),
        plans={name: tables.plan_rows(metrics[name]) for name in config.trained_candidates},
        objectives={name: _objective(run) for name, run in config.training_runs().items()},
        layers={
            name: {
                "settings": settings,
                "grids": tables.layer_grids(metrics[name]["layers"], settings),
                "figure": _sensitivity_figure(name, metrics[name]["layers"], series[name]),
            }
            for name in config.steps
            if isinstance(settings := config.step_settings(name), QuantizeConfig)
        },
        pruned={
            name: {
                "figures": _pruning_figures(name, metrics[name], series[name]),
                "grids": grids(metrics[name]["layers"]),
            }
            for name, step in config.steps.items()
            if step.kind == StepKind.prune
        },
        passport=passport,
        parity=tables.parity_grid(passport["rows"]) if passport else None,
        check_counts=tables.check_counts(passport["rows"]) if passport else [],
        lineage=draw_lineage(parents, config.candidates),
        times=tables.stage_times(parents, config.candidates),
        total_seconds=sum(artifact.seconds for artifact in parents.values()),
        versions=tables.versions_used(parents),
        settings=chosen_settings,
        changed={name: value for name, value in chosen_settings.items() if defaults.get(name) != value},
    )


def _objective(run: TrainingRun) -> str:
    if run.objective == Objective.cross_entropy:
        return "cross-entropy"
    parts = {
        f"from {run.start}": run.start,
        f"from layers {', '.join(map(str, run.student_layers))} of the teacher": run.student_layers,
        f"the teacher's {run.cache_top_k} likeliest tokens cached": run.cache_top_k,
        f"hidden states ({run.hidden.distance}) x {run.hidden.weight:g}": run.hidden.weight,
        f"attention relations x {run.relations.weight:g}": run.relations.weight,
        f"on its own text in {run.on_policy_share:.0%} of steps": run.on_policy_share,
    }
    scores = f"distillation ({run.divergence}), T = {run.temperature:g}, α = {run.alpha:g}"  # noqa: RUF001
    return ", ".join([scores, *(words for words, is_so in parts.items() if is_so)])


def _series(config: Config) -> dict[str, int]:
    """The colour of each candidate: that of the trained model it comes from."""
    series: dict[str, int] = {}
    for name in config.candidates:
        if name in config.trained_candidates:
            series[name] = config.trained_candidates.index(name) % len(SERIES)
        else:
            series[name] = series[config.steps[name].source]
    return series


def candidate_figures(config: Config, metrics: Mapping[str, Any]) -> dict[str, Markup]:
    """Quality against each cost, by the cost's name; candidates whose loss is no number are left out."""
    known, series = metrics["baselines"], _series(config)
    if "frequencies_loss" in known:
        quality, y_label, baselines = "loss", "loss, nats per text", {"label frequencies": known["frequencies_loss"]}
    else:
        quality, y_label = "bits_per_byte", "bits per byte"
        baselines = {"unigram": known["unigram_bits_per_byte"], "xz -9": known["xz_bits_per_byte"]}
    rows = [row for row in metrics["gates"]["candidates"] if math.isfinite(row[quality])]

    def against(measure: str, divisor: float, x_label: str) -> Markup:
        points = [
            Point(
                gid=f"{measure}-{row['name']}",
                label=row["name"],
                x=row[measure] / divisor,
                y=row[quality],
                series=series[row["name"]],
                quantized=row["kind"] == StepKind.quantize,
                passed=row["passed"],
                chosen=row["name"] == metrics["gates"]["chosen"],
                on_front=measure in row["fronts"],
                note=f"{row['name']}: {'; '.join(row['reasons']) or 'passed'}",
            )
            for row in rows
        ]
        return plane(points, x_label, y_label, baselines, f"front-{measure}", *FIGURE_SIZE)

    return {
        "size": against("program_bytes", 1e6, "program size, MB"),
        "latency": against("p50_ms", 1, "p50 latency, ms"),
    }


def _pruning_figures(name: str, pruned: Mapping[str, Any], series: int) -> list[Markup]:
    """Importance of layers, and of each width from the best part down, with a dot where it was cut."""
    found, shape = pruned["importance"], pruned["shape"]
    kept = found["kept_layers"]
    solid = [kept is None or number in kept for number in range(len(found["layers"]))]
    measure = {"cosine": "1 - cosine of what enters and leaves", "loss": "loss without it, nats more"}
    figures = [bars(found["layers"], solid, f"importance-{name}", series, ("layer", measure[found["layers_by"]]))]
    of_width = {"neurons": "intermediate_size", "heads": "num_attention_heads", "channels": "hidden_size"}
    for width, layers in found["widths"].items():
        before, after = shape[of_width[width]]
        lines = []
        for number, scores in enumerate(layers):
            shares = [place / max(1, len(scores) - 1) for place in range(len(scores))]
            cut = min(round(after / before * len(scores)), len(scores)) - 1
            lines.append(Curve(f"{width}-{name}-{number}", shares, scores, series))
            if after < before:
                lines.append(Curve(f"{width}-cut-{name}-{number}", [shares[cut]], [scores[cut]], series, marked=True))
        label = f"importance of {width}, of the largest"
        figures.append(curves(lines, "share of them, best first", label, *FIGURE_SIZE, from_zero=True))
    return figures


def _sensitivity_figure(name: str, layers: Sequence[Mapping[str, Any]], series: int) -> Markup | None:
    """A bar for each matrix that was quantized alone, in the order of the table; hollow = it stays as it is."""
    measured = [layer for layer in layers if layer["sensitivity"] is not None]
    if not measured:
        return None
    labels = ("matrix, in the order of the model", "divergence when it alone is quantized, nats per token")
    values = [layer["sensitivity"] for layer in measured]
    return bars(values, [layer["scheme"] is not None for layer in measured], f"sensitivity-{name}", series, labels)


def _training_figures(config: Config, metrics: Mapping[str, Any]) -> dict[str, Markup]:
    series = _series(config)

    def over_steps(kinds: Mapping[str, bool], y_label: str, size: tuple[float, float]) -> Markup:
        lines = []
        for name in config.trained_candidates:
            for kind, marked in kinds.items():
                events = [event for event in metrics[name]["curve"] if kind in event]
                steps, values = [event["step"] for event in events], [event[kind] for event in events]
                lines.append(Curve(f"{kind}-{name}", steps, values, series[name], marked))
        return curves(lines, "step", y_label, *size, from_zero="validation_loss" not in kinds)

    unit = "text" if config.model.family == Family.sequence_classification else "token"
    return {
        "loss": over_steps({"train_loss": False, "validation_loss": True}, f"loss, nats per {unit}", WIDE_FIGURE_SIZE),
        "learning_rate": over_steps({"learning_rate": False}, "learning rate", FIGURE_SIZE),
        "throughput": over_steps({"tokens_per_s": False}, "tokens per second", FIGURE_SIZE),
        "memory": over_steps({"peak_memory_bytes": False}, "peak memory of a rank, bytes", FIGURE_SIZE),
        "grad_norm": over_steps({"grad_norm": False}, "gradient norm", FIGURE_SIZE),
    }
