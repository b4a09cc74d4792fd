"""Stage `report`: one self-contained HTML page about the run, that a person looks at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.artifact import Artifact, digest_file, digest_json
from flows.config import Config

REPORT = "report.html"
PLOTS = {"size": "pareto_size.svg", "latency": "pareto_latency.svg"}
"""Quality against cost, as files of their own."""


def fingerprint(config: Config) -> str:
    """Digest of the page's template and style sheet, which are not code of ours to the artifact store."""
    here = Path(__file__).parent
    return digest_json({path.name: digest_file(path) for path in sorted(here.glob("report.*"))})


def build(directory: Path, config: Config, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes `report.html`, which loads nothing from anywhere, and `PLOTS`; the same parents give the same bytes.

    Args:
        directory: Where it goes.
        config: The run.
        parents: All artifacts of the run, by role; see `flows.report.page.render`.
    """
    from flows.report.figures import standalone  # matplotlib is not needed to find a report that exists
    from flows.report.page import STYLE_SHEET, TEMPLATES, candidate_figures, render

    page = render(config, parents).encode()
    (directory / REPORT).write_bytes(page)
    style = (TEMPLATES / STYLE_SHEET).read_text()
    figures = candidate_figures(config, {role: artifact.metrics for role, artifact in parents.items()})
    for name, file in PLOTS.items():
        (directory / file).write_text(standalone(figures[name], style))
    return {"bytes": len(page)}
