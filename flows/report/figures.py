"""Plots as inline SVG that follows the page's colours and fonts, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from flows.report.number_format import significant

INK, MUTED, GRID, PAPER = "#010100", "#010101", "#010102", "#010103"
SERIES = tuple(f"#0101{number:02x}" for number in range(16, 22))
"""Stand-ins that become the style sheet's variables: matplotlib wants colours, the page decides on them."""
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--rule", PAPER: "--card"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}
POINTS_PER_INCH = 72
BARS_SIZE = (390.0, 250.0)
MARK_RADIUS = 7.5
"""Points around a candidate's place that its mark and ring may cover."""
BESIDE_MARK = (
    ("left", 8, 5),
    ("left", 8, -11),
    ("right", -8, 5),
    ("right", -8, -11),
    ("center", 0, 11),
    ("center", 0, -17),
)
"""Where a candidate's name may stand, best first: how it is aligned, and points to the right and up."""
ALONG_LINE = (("right", 1, 3), ("right", 1, -9), ("left", 0, 3), ("left", 0, -9))
"""Where a baseline's name may stand, best first: how it is aligned, share of the width, and points up."""


@dataclass(frozen=True)
class Curve:
    """One line of a plot over training steps."""

    gid: str
    """Id of its element."""
    steps: Sequence[float]
    values: Sequence[float]
    series: int
    """Which colour it has."""
    marked: bool = False
    """Drawn strong, with a dot at each point; else as a thin line."""


@dataclass(frozen=True)
class Point:
    """One candidate in a plane of two measures."""

    gid: str
    """Id of its element."""
    label: str
    x: float
    y: float
    series: int
    quantized: bool
    passed: bool
    chosen: bool
    on_front: bool
    """Whether no other candidate that passed is at least as good in both measures and better in one."""
    note: str = ""
    """What the pointer shows when it rests on the mark."""


def curves(
    lines: Sequence[Curve], x_label: str, y_label: str, width: float, height: float, *, from_zero: bool
) -> Markup:
    """A plot of curves over steps.

    Args:
        lines: What to draw; the later lies on top.
        x_label: What the horizontal axis is.
        y_label: What the vertical axis is, with its unit.
        width: In points, 1/72 inch; the page scales it.
        height: In points.
        from_zero: Whether the vertical axis starts at zero.
    """
    with _plot(f"{y_label} over {x_label}", width, height) as (figure, axes):
        for line in lines:
            axes.plot(
                line.steps,
                line.values,
                color=SERIES[line.series],
                linewidth=1.8 if line.marked else 0.9,
                alpha=1.0 if line.marked else 0.75,
                marker="o" if line.marked or len(line.steps) == 1 else "",
                markersize=3.2,
                gid=line.gid,
            )
        axes.set_title(y_label, loc="left", fontsize=9, color=MUTED)
        axes.set_xlabel(x_label)
        if from_zero:
            axes.set_ylim(bottom=0)
        return _to_svg(figure, f"{y_label} over {x_label}")


def bars(values: Sequence[float], solid: Sequence[bool], gid: str, series: int, labels: tuple[str, str]) -> Markup:
    """A plot of a bar for each part of a model, numbered from 0; those that were taken out are hollow.

    Args:
        values: Heights.
        solid: Whether the part is still there.
        gid: What the ids of the bars start with; their numbers follow.
        series: Which colour they have.
        labels: What the parts are, and what the heights are.
    """
    description = f"{labels[1]} by {labels[0]}"
    with _plot(description, *BARS_SIZE) as (figure, axes):
        for number, (value, filled) in enumerate(zip(values, solid, strict=True)):
            colour = SERIES[series]
            bar = axes.bar(number, value, 0.7, color=colour if filled else PAPER, edgecolor=colour, linewidth=1.4)
            bar[0].set_gid(f"{gid}-{number}")
        axes.set_title(labels[1], loc="left", fontsize=9, color=MUTED)
        axes.set_xlabel(labels[0])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _to_svg(figure, description)


def plane(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    lines: Mapping[str, float],
    front_gid: str,
    width: float,
    height: float,
) -> Markup:
    """A plot of candidates and their Pareto front.

    Shape tells the number format, a hollow mark with a cross a failed gate, grey one that is dominated, a ring the one
    that was chosen.

    Args:
        points: The candidates.
        x_label: What the horizontal axis is, with its unit; it starts at zero.
        y_label: What the vertical axis is, with its unit.
        lines: Baselines to draw at a height, by their name.
        front_gid: Id of the front's line.
        width: In points, 1/72 inch; the page scales it.
        height: In points.
    """
    with _plot(f"{y_label} against {x_label}", width, height) as (figure, axes):
        axes.set_title(y_label, loc="left", fontsize=9, color=MUTED)
        front = sorted((point.x, point.y) for point in points if point.on_front)
        if front:
            axes.step(*zip(*front, strict=True), where="post", color=MUTED, linewidth=1.2, gid=front_gid)
        for point in points:
            colour = SERIES[point.series] if point.on_front or not point.passed else MUTED
            if point.chosen:
                axes.plot(point.x, point.y, "o", markersize=15, markerfacecolor="none", markeredgecolor=colour)
            axes.plot(
                point.x,
                point.y,
                marker="D" if point.quantized else "o",
                markersize=6 if point.quantized else 7.5,
                markerfacecolor=colour if point.passed else PAPER,
                markeredgecolor=colour,
                markeredgewidth=1.4,
                gid=point.gid,
            )
            if not point.passed:
                axes.plot(point.x, point.y, "x", markersize=6, markeredgecolor=colour, markeredgewidth=1.4)
        axes.set_xlim(0, 1.2 * max(point.x for point in points))
        axes.margins(y=0.2)
        for value in lines.values():
            axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel(x_label)
        figure.draw_without_rendering()  # settles the axes, so that texts can be measured
        centres = [axes.transData.transform((point.x, point.y)) for point in points]
        taken = [
            Bbox.from_extents(x - r, y - r, x + r, y + r) for x, y in centres for r in [_pixels(figure, MARK_RADIUS)]
        ]
        for value in lines.values():
            _, y = axes.transData.transform((0, value))
            taken.append(Bbox.from_extents(axes.bbox.x0, y - 0.5, axes.bbox.x1, y + 0.5))
        for name, value in lines.items():
            text = f"{name} {significant(value)}"
            data = {"xycoords": ("axes fraction", "data"), "color": MUTED}
            _write(
                axes, text, [{**data, "ha": ha, "xy": (x, value), "xytext": (0, up)} for ha, x, up in ALONG_LINE], taken
            )
        for point in points:
            options = [{"ha": ha, "xy": (point.x, point.y), "xytext": offset} for ha, *offset in BESIDE_MARK]
            _write(axes, point.label, options, taken)
        svg = _to_svg(figure, f"{y_label} against {x_label}")
    for point in points:
        mark = Markup('<g id="{}">').format(point.gid)
        svg = svg.replace(mark, mark + Markup("<title>{}</title>").format(point.note or point.label))
    return svg


def standalone(svg: Markup, style: str) -> str:
    """A plot as a file of its own, with colours in the place of the page's.

    Args:
        svg: As made here.
        style: The style sheet, of which the first value of each variable counts.
    """
    root = f'<svg xmlns="http://www.w3.org/2000/svg" style="background: var({VARIABLES[PAPER]})" '
    text = str(svg).replace("<svg ", root, 1)
    for variable in VARIABLES.values():
        found = re.search(rf"{variable}: (#[0-9a-f]+);", style)
        assert found is not None, f"{variable} is not in the style sheet"
        text = text.replace(f"var({variable})", found[1])
    return text.replace("font-family: inherit", "font-family: sans-serif")


@contextmanager
def _plot(salt: str, width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": salt}]):  # ids are random without a salt
        figure = Figure((width / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")
        axes = figure.add_subplot()
        axes.tick_params(length=0)
        axes.xaxis.set_major_formatter(FuncFormatter(_tick_text))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick_text))
        yield figure, axes


def _tick_text(value: float, _: object) -> str:
    return EngFormatter(sep=" ")(value) if abs(value) >= 1000 else f"{value:g}"


def _pixels(figure: Figure, points: float) -> float:
    return points / POINTS_PER_INCH * figure.dpi


def _write(axes: Axes, text: str, options: Sequence[Mapping[str, Any]], taken: list[Bbox]) -> None:
    """Writes the text where it covers the fewest of what is taken, the first of `options` if several are as good."""
    frame = axes.get_window_extent()
    drafts = [axes.annotate(text, textcoords="offset points", **option) for option in options]
    boxes = [draft.get_window_extent() for draft in drafts]
    clashes = [
        sum(box.overlaps(other) for other in taken) + 2 * (box.x0 < frame.x0 or box.x1 > frame.x1 + 1) for box in boxes
    ]
    best = clashes.index(min(clashes))
    for number, draft in enumerate(drafts):
        if number != best:
            draft.remove()
    taken.append(boxes[best])


def _to_svg(figure: Figure, description: str) -> Markup:
    """The figure as an SVG element that takes nothing from outside: no links; the page's fonts, colours, size."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    _, body = buffer.getvalue().split("</defs>", 1)  # the first definition is a style for the whole document
    box = "0 0 {:g} {:g}".format(*(figure.get_size_inches() * POINTS_PER_INCH))
    body = body.replace("xlink:href", "href")
    body = re.sub(r' id="(matplotlib\.)?[A-Za-z0-9]+_\d+"', "", body)  # numbered, so several figures would share them
    body = re.sub(r"font-family: [^;]*", "font-family: inherit", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return Markup('<svg role="img" aria-label="{}" viewBox="{}">').format(description, box) + Markup(body)
