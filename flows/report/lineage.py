"""What came from what, from the data to the served version, laid out to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flows.artifact import Artifact, read_manifest

BOX_HEIGHT, GAP, LANE_HEIGHT, MARGIN = 42, 22, 58, 6
DIGEST_WIDTH, LETTER_WIDTH, PADDING = 74, 7.8, 10
MEASUREMENTS = ("quality", "latency", "baselines")
"""Roles left out: they decide what is published, not what is in it."""


@dataclass(frozen=True)
class Node:
    """An artifact as a box."""

    role: str
    title: str
    digest: str
    x: float
    y: float
    served: bool
    """Whether the published version, or what the gates decided on, holds what is in it."""


@dataclass(frozen=True)
class Edge:
    """That one artifact was made from another, as an SVG path."""

    path: str
    served: bool


@dataclass(frozen=True)
class Drawing:
    """Boxes and lines in user units."""

    width: float
    height: float
    box_width: float
    box_height: float
    nodes: Sequence[Node]
    edges: Sequence[Edge]


def draw_lineage(artifacts: Mapping[str, Artifact], candidates: Sequence[str]) -> Drawing:
    """The recorded parents of the artifacts as a graph that runs from left to right, one lane for each candidate.

    Args:
        artifacts: By role in the chain; each manifest names the digests of what it was made from.
        candidates: Names of the models, in the order of their lanes.
    """
    drawn = {role: one for role, one in artifacts.items() if role.partition(":")[0] not in MEASUREMENTS}
    parents = _direct(_recorded_parents(drawn))
    columns: dict[str, int] = {}
    for role in _parents_first(parents):
        columns[role] = 1 + max((columns[parent] for parent in parents[role]), default=-1)
    served = _ancestors("entry", parents) | {"publish", "passport"} if "entry" in drawn else set[str]()
    lanes = _lanes(drawn, candidates, served)
    titles = {role: _title(role, artifact) for role, artifact in drawn.items()}
    box_width = 2 * PADDING + max(DIGEST_WIDTH, *(LETTER_WIDTH * len(title) for title in titles.values()))
    places = {
        role: (MARGIN + column * (box_width + GAP), MARGIN + lanes[role] * LANE_HEIGHT)
        for role, column in columns.items()
    }
    return Drawing(
        width=2 * MARGIN + (max(columns.values()) + 1) * (box_width + GAP) - GAP,
        height=2 * MARGIN + max(lanes.values()) * LANE_HEIGHT + BOX_HEIGHT,
        box_width=box_width,
        box_height=BOX_HEIGHT,
        nodes=[Node(role, titles[role], drawn[role].digest, *places[role], role in served) for role in drawn],
        edges=sorted(
            (
                Edge(_path(places[parent], places[role], box_width), parent in served and role in served)
                for role in drawn
                for parent in sorted(parents[role])
            ),
            key=lambda edge: edge.served,  # the later is drawn on top
        ),
    )


def _recorded_parents(artifacts: Mapping[str, Artifact]) -> dict[str, set[str]]:
    role_of = {artifact.digest: role for role, artifact in artifacts.items()}
    recorded = {role: read_manifest(artifact.path)["parents"].values() for role, artifact in artifacts.items()}
    return {
        role: {role_of[parent["digest"]] for parent in parents if parent["digest"] in role_of} - {role}
        for role, parents in recorded.items()
    }


def _ancestors(role: str, parents: Mapping[str, set[str]]) -> set[str]:
    return {role}.union(*(_ancestors(parent, parents) for parent in parents[role]))


def _direct(parents: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Only the lines that no longer way replaces (the transitive reduction)."""
    return {
        role: {one for one in mine if not any(one in _ancestors(other, parents) for other in mine if other != one)}
        for role, mine in parents.items()
    }


def _parents_first(parents: Mapping[str, set[str]]) -> list[str]:
    return sorted(parents, key=lambda role: len(_ancestors(role, parents)))


def _lanes(roles: Mapping[str, Artifact], candidates: Sequence[str], served: set[str]) -> dict[str, float]:
    """Candidates one below the other, what all share in the middle, gates below, what is served beside its program."""
    lane_of = {name: float(lane) for lane, name in enumerate(candidates)}
    chosen = max((lane_of[name] for name in candidates if name in served), default=0.0)  # the last was made of others
    middle = (len(candidates) - 1) / 2
    shared = {"gates": float(len(candidates)), **dict.fromkeys(("split", "entry", "passport", "publish"), chosen)}
    return {role: lane_of.get(role.removeprefix("program:"), shared.get(role, middle)) for role in roles}


def _title(role: str, artifact: Artifact) -> str:
    return f"version {artifact.metrics['version']}" if role == "publish" else role.partition(":")[0]


def _path(start: tuple[float, float], end: tuple[float, float], box_width: float) -> str:
    """Straight to the gap before the target's column, where no box is in the way, then in a curve to the target."""
    x0, y0 = start[0] + box_width, start[1] + BOX_HEIGHT / 2
    x1, y1 = end[0], end[1] + BOX_HEIGHT / 2
    bend, middle = x1 - GAP, x1 - GAP / 2
    return f"M{x0:g} {y0:g}H{bend:g}C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"
