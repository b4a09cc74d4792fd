"""Measurements of kernels as a table for the terminal, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from kernels.timing import Limits, Timing

KERNEL, PLAIN, COMPILED = "kernel", "plain", "torch.compile"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One pass of one workload, by every implementation."""

    op: str
    workload: str
    of: str
    """Which pass: forward, backward or both."""
    checked_at: dict[str, int]
    """Sizes at which the kernel was compared with float64 before."""
    least_bytes: int
    least_flops: int
    least_ms: float
    """In which no kernel can be done on this GPU."""
    timings: dict[str, Timing]
    """By implementation: "kernel", "plain", "torch.compile" and rivals."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Beyond the inputs, by implementation."""
    failed: dict[str, str] = field(default_factory=dict)
    """Implementations that could not be measured, and why."""

    @property
    def share(self) -> float | None:
        """Of the limit, that the kernel reaches; None where no work is counted."""
        return self.least_ms / self.timings[KERNEL].median_ms if self.least_ms else None

    def ratio(self, other: str) -> float | None:
        """How many times longer another implementation takes; None if it was not measured."""
        return self.timings[other].median_ms / self.timings[KERNEL].median_ms if other in self.timings else None


@dataclass(frozen=True)
class Report:
    """All that one run of the benchmark found."""

    machine: dict[str, str]
    limits: Limits
    measurements: list[Measurement]
    refused: dict[str, str]
    """Workloads whose kernels are wrong, and how: without numbers."""


def table(report: Report) -> str:
    """Lines of a terminal: a pass each, then what was refused."""
    rows = [("workload", "pass", "median ms", "p20 - p80", "of limit", "x plain", "x compile", "x rivals", "peak MiB")]
    for one in report.measurements:
        own = one.timings[KERNEL]
        rivals = [name for name in one.timings if name not in (KERNEL, PLAIN, COMPILED)]
        rows.append((
            one.workload,
            one.of,
            f"{own.median_ms:.4f}",
            f"{own.p20_ms:.4f} - {own.p80_ms:.4f}",
            "-" if one.share is None else f"{one.share:.1%}",
            _times(one, PLAIN),
            _times(one, COMPILED),
            " ".join(f"{name} {_times(one, name)}" for name in rivals) or "-",
            f"{one.peak_bytes[KERNEL] / 1024**2:.1f}" if KERNEL in one.peak_bytes else "-",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        f"{one.workload} {one.of}: {name} failed: {why}"
        for one in report.measurements
        for name, why in one.failed.items()
    ]
    return "\n".join([*lines, *(f"REFUSED {workload}: {why}" for workload, why in report.refused.items())])


def to_json(report: Report) -> str:
    """Everything, with what it was measured on; readable by `from_json`."""
    return json.dumps(asdict(report), indent=1) + "\n"


def from_json(text: str) -> Report:
    """What `to_json` wrote."""
    read = json.loads(text)
    measurements = [
        Measurement(**{**one, "timings": {name: Timing(**timing) for name, timing in one["timings"].items()}})
        for one in read["measurements"]
    ]
    return Report(read["machine"], Limits(**read["limits"]), measurements, read["refused"])


def plot(report: Report, path: Path) -> bool:
    """Draws the share of the limit of every pass into a file; False without matplotlib."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    shown = [one for one in report.measurements if one.share is not None]
    figure = Figure(figsize=(10, 1 + 0.3 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for place, one in enumerate(shown):
        shares = {name: 100 * one.least_ms / timing.median_ms for name, timing in one.timings.items()}
        axes.barh(place, shares.pop(KERNEL), color="tab:blue", label=KERNEL if place == 0 else None)
        for name, share in shares.items():
            axes.plot(share, place, _markers(shown)[name], color="black", markersize=5)
    for name, marker in _markers(shown).items():
        axes.plot([], [], marker, color="black", label=name)
    axes.set_yticks(range(len(shown)), [f"{one.workload} {one.of}" for one in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"% of what {report.machine.get('gpu', 'this GPU')} allows")
    axes.axvline(100, color="tab:red")
    axes.legend(loc="lower right", fontsize=7)
    figure.savefig(path)
    return True


def _times(one: Measurement, other: str) -> str:
    ratio = one.ratio(other)
    return "-" if ratio is None else f"{ratio:.2f}"


def _markers(measurements: Sequence[Measurement]) -> dict[str, str]:
    names = dict.fromkeys(name for one in measurements for name in one.timings if name != KERNEL)
    return dict(zip(names, _endless("osD^vPX*"), strict=False))


def _endless(marks: str) -> Iterator[str]:
    while True:
        yield from marks


def machine_lines(machine: dict[str, str], limits: Limits) -> Iterable[str]:
    """What it was measured on, for the terminal."""
    yield "  ".join(f"{name} {value}" for name, value in machine.items())
    rates = "  ".join(
        f"{dtype.removeprefix('torch.')} {rate / 1e12:.0f}" for dtype, rate in limits.flops_per_second.items()
    )
    yield f"copies {limits.bytes_per_second / 1e12:.2f} TB/s; multiplies (TFLOP/s): {rates}"
