"""What the stages measured, turned into the rows and grids of the page."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.artifact import Artifact, read_manifest
from flows.config.quantize import QuantizeConfig
from flows.config.steps import BASE, StepConfig

WARM_DB = 20.0
"""A layer that is this much above the least ratio is shown plain."""


@dataclass(frozen=True)
class Cell:
    """A number of a grid and how warm it is shown."""

    value: float
    heat: float
    """0 is plain, 1 the warmest."""


@dataclass(frozen=True)
class Grid:
    """Numbers by row and column; a cell that does not exist is None."""

    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell | None]]


def layer_grids(layers: Sequence[Mapping[str, Any]], config: QuantizeConfig) -> list[Grid]:
    """Signal-to-quantization-noise ratio of quantized layers, in dB: a grid of repeated blocks, one of other layers.

    The nearer a layer is to the least that is allowed, the warmer it is.

    Args:
        layers: Rows of the quantization report: `name`, `scheme`, `sqnr_db`, `skipped_reason`.
        config: How the model was quantized.
    """
    cells = {}
    for layer in layers:
        if layer["skipped_reason"] is None:
            heat = 1 - (layer["sqnr_db"] - config.least_sqnr_db(layer["scheme"])) / WARM_DB
            cells[layer["name"]] = Cell(layer["sqnr_db"], min(1.0, max(0.0, heat)))
    return _block_grids(cells)


def sparsity_grids(layers: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Share of zeros in each matrix: a grid of repeated blocks, one of the others.

    Args:
        layers: Rows of the pruning report: `name`, `sparsity`.
    """
    return _block_grids({layer["name"]: Cell(layer["sparsity"], layer["sparsity"]) for layer in layers})


def _block_grids(cells: Mapping[str, Cell]) -> list[Grid]:
    blocks: dict[str, dict[str, Cell]] = defaultdict(dict)
    others: dict[str, dict[str, Cell]] = {}
    for name, cell in cells.items():
        block = re.fullmatch(r"(.*\.\d+)\.(.+)", name)
        if block:
            blocks[block[1]][block[2].rpartition(".")[2]] = cell
        else:
            others[name] = {"": cell}
    return [_grid(values) for values in (blocks, others) if values]


def parity_grid(checks: Sequence[Mapping[str, Any]]) -> Grid:
    """Worst difference between served and trained scores as a share of the tolerance, by batch size and length.

    Args:
        checks: Rows of the passport; those called `scores` count, over all transports and paddings.
    """
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    for check in checks:
        if check["name"] == "scores":
            row, column = str(check["details"]["batch_size"]), str(check["details"]["length"])
            share = check["worst_difference"] / check["tolerance"]
            worst[row][column] = max(share, worst[row].get(column, 0.0))
    return _grid({row: {name: Cell(share, share) for name, share in line.items()} for row, line in worst.items()})


def check_counts(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per kind of check: how many, how many passed, and the worst difference where numbers are compared."""
    rows = []
    for name in dict.fromkeys(check["name"] for check in checks):
        mine = [check for check in checks if check["name"] == name]
        differences = [check["worst_difference"] for check in mine if check.get("worst_difference") is not None]
        near_ties = sum(
            check["details"].get("near_ties", 0) + (check["details"].get("reason") == "near tie") for check in mine
        )
        rows.append(
            {
                "name": name,
                "checks": len(mine),
                "passed": sum(check["passed"] for check in mine),
                "worst_difference": max(differences, default=None),
                "near_ties": near_ties,
            }
        )
    return rows


def descents(steps: Mapping[str, StepConfig]) -> dict[str, str]:
    """How each candidate came from the base model, e.g. `base → prune: small → distill by base: healed`."""
    found = {BASE: BASE}
    for name, step in steps.items():
        how = f"{step.kind} by {step.source}" if step.start else step.kind
        found[name] = f"{found[step.start or step.source]} → {how}: {name}"
    return found


def stage_times(artifacts: Mapping[str, Artifact], candidates: Sequence[str]) -> list[tuple[Artifact, float]]:
    """The artifacts in the order in which the chain makes them, with their time as a share of the longest.

    Args:
        artifacts: By role in the chain.
        candidates: Names of the models.
    """
    before = [*(role for role in artifacts if role.startswith("corpus")), "tokenizer", "tokens", "baselines"]
    measured = [f"{kind}:{name}" for kind in ("program", "quality") for name in candidates]
    order = [*before, *candidates, *measured, "latency", "gates", "entry", "passport", "publish"]
    longest = max(artifact.seconds for artifact in artifacts.values())
    return [
        (artifacts[role], artifacts[role].seconds / longest if longest else 0.0) for role in order if role in artifacts
    ]


def versions_used(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Libraries and the versions that the artifacts were made with; several where they differ."""
    versions: dict[str, dict[str, None]] = defaultdict(dict)
    for artifact in artifacts.values():
        for library, version in read_manifest(artifact.path)["versions"].items():
            versions[library][version] = None
    return {library: ", ".join(sorted(found)) for library, found in versions.items()}


def plan_rows(run: Mapping[str, Any]) -> list[tuple[str, float, float, str]]:
    """What was planned for a training run and what was measured: (measure, planned, measured, unit).

    Args:
        run: Metrics of the training stage; without a plan, or where nothing was left to train, there are no rows.
    """
    plan, measured = run["plan"], run["measured"]
    if plan is None or not measured:
        return []
    steps = run["steps"] - run["resumed_from_step"]  # time is known of those after a resumption only
    peak = max(event["peak_memory_bytes"] for event in run["curve"] if "peak_memory_bytes" in event)
    rows = [
        ("Memory of a rank at its peak", plan["memory_bytes"], peak, "size"),
        ("A step, ms", 1000 * plan["step_s"], measured["step_ms_p50"], "significant"),
        ("Tokens per second", plan["tokens_per_s"], measured["tokens_per_s"], "count"),
        (f"{steps} steps", steps * plan["step_s"], measured["train_s"], "duration"),
    ]
    if "mfu" in measured:
        rows.append(("Share of the hardware's peak", plan["mfu"], measured["mfu"], "significant"))
    return rows


def settings(plain: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration as dotted names and values, as they are typed on the command line."""
    found: dict[str, str] = {}
    for name, value in plain.items():
        if isinstance(value, Mapping) and value:
            found |= settings(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _typed(value)
    return found


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "{}" if value == {} else str(value)


def _grid(values: Mapping[str, Mapping[str, Cell]]) -> Grid:
    columns = list(dict.fromkeys(column for row in values.values() for column in row))
    return Grid(columns, {name: [row.get(column) for column in columns] for name, row in values.items()})
