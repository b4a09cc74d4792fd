"""Table, JSON and plot of measurements that were made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels import bench_report
from kernels.bench_report import Measurement, Report
from kernels.timing import Limits, Timing


def measurement(of: str, least_ms: float, **changes: object) -> Measurement:
    values = {
        "op": "rms_norm",
        "workload": "rms_norm rows=2 bfloat16",
        "of": of,
        "checked_at": {"rows": 2},
        "least_bytes": 100,
        "least_flops": 0,
        "least_ms": least_ms,
        "timings": {
            "kernel": Timing(0.5, 0.4, 0.6),
            "plain": Timing(2.0, 1.9, 2.1),
            "torch.compile": Timing(0.75, 0.7, 0.8),
            "liger": Timing(0.6, 0.6, 0.6),
        },
        "peak_bytes": {"kernel": 3 * 1024**2, "plain": 9 * 1024**2},
    }
    return Measurement(**{**values, **changes})


REPORT = Report(
    {"gpu": "Some GPU", "torch": "2.11.0"},
    Limits(4.3e12, {"torch.bfloat16": 790e12, "torch.int8": 1500e12}),
    [
        measurement("forward", 0.45),
        measurement("backward", 0.0, timings={"kernel": Timing(1.0, 1.0, 1.0)}, failed={"plain": "out of memory"}),
    ],
    {"swiglu rows=2": "result 0: error 1 where 0.1 is allowed"},
)


def test_table() -> None:
    header, forward, backward, *rest = bench_report.table(REPORT).splitlines()
    assert header.split("  ")[0] == "workload"
    cells = [cell.strip() for cell in forward.split("  ") if cell.strip()]
    assert cells[:4] == ["rms_norm rows=2 bfloat16", "forward", "0.5000", "0.4000 - 0.6000"]
    assert cells[4:] == ["90.0%", "4.00", "1.50", "liger 1.20", "3.0"]
    cells = [cell.strip() for cell in backward.split("  ") if cell.strip()]
    assert cells[4:] == ["-", "-", "-", "-", "3.0"]
    assert rest == [
        "rms_norm rows=2 bfloat16 backward: plain failed: out of memory",
        "REFUSED swiglu rows=2: result 0: error 1 where 0.1 is allowed",
    ]
    assert list(bench_report.machine_lines(REPORT.machine, REPORT.limits)) == [
        "gpu Some GPU  torch 2.11.0",
        "copies 4.30 TB/s; multiplies (TFLOP/s): bfloat16 790  int8 1500",
    ]


def test_json_holds_everything() -> None:
    text = bench_report.to_json(REPORT)
    assert bench_report.from_json(text) == REPORT
    assert json.loads(text)["machine"]["gpu"] == "Some GPU"


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plot.svg"
    assert bench_report.plot(REPORT, path)
    drawn = path.read_text()
    assert drawn.startswith("<?xml")
    assert drawn.count("<!-- rms_norm rows=2 bfloat16 forward -->") == 1
    assert "<!-- rms_norm rows=2 bfloat16 backward -->" not in drawn  # it has no share
    monkeypatch.setattr(bench_report, "find_spec", lambda name: None)
    assert not bench_report.plot(REPORT, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
