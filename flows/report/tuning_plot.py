"""What every trial of a tuning served, against how long it let wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flows.config.tuning import TuneConfig, TuneTask
from flows.serving.tuning import Trial


def draw_trials(trials: Sequence[Trial], best: Trial, config: TuneConfig, path: Path) -> None:
    """Draws the trials that could be measured, the target and the best one.

    Args:
        trials: All of them.
        best: One of them.
        config: What was looked for.
        path: SVG file.
    """
    measured = [trial for trial in trials if not trial.impossible]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter([trial.p95_ms for trial in measured], [trial.per_s for trial in measured], color="tab:gray")
    axes.scatter([best.p95_ms], [best.per_s], color="tab:blue", zorder=3)
    axes.axvline(config.target_p95_ms, color="tab:red", linestyle="--", linewidth=1)
    axes.annotate(" target", (config.target_p95_ms, 0), color="tab:red")
    label = "\n".join(f"{name}={value}" for name, value in best.settings.items())
    axes.annotate(label, (best.p95_ms, best.per_s), textcoords="offset points", xytext=(8, -8), va="top", fontsize=8)
    axes.set(
        xlabel=f"{config.latency.replace('_', ' ')}, 95th percentile, ms",
        ylabel="tokens/s" if config.task == TuneTask.text else "rows/s",
        title=f"{len(measured)} trials, {config.clients} clients",
    )
    axes.set_ylim(bottom=0)
    figure.savefig(path, metadata={"Date": None})
