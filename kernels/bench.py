# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""Measures every kernel on a GPU, once it is right: `python -m kernels.bench [--op ...] [--output FILE]`.

A kernel is compared with plain torch in float64 first; a wrong one gets no numbers. Then each pass is timed beside
plain torch, torch.compile and the rivals that are installed, and held against the most that this GPU was seen to copy
and multiply in the same run. `--dry` lists what would run, without a GPU. Needs torch and triton alone.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels import bench_report
from kernels.bench_report import COMPILED, KERNEL, PLAIN, Measurement, Report
from kernels.correctness import verdict
from kernels.timing import CudaStopwatch, Limits, Stopwatch, Timing, measure_limits, timed
from kernels.workloads import Call, Cost, Trial, Workload, all_workloads


def measure(
    workloads: Sequence[Workload], device: torch.device, stopwatch: Stopwatch, limits: Limits, machine: dict[str, str]
) -> Report:
    """Checks each workload, and measures it if it is right."""
    report = Report(machine, limits, [], {})
    for place, workload in enumerate(workloads, 1):
        print(f"[{place}/{len(workloads)}] {workload.name}", file=sys.stderr, flush=True)
        found = verdict(workload, device)
        if found.error is not None:
            report.refused[workload.name] = f"{found.error} (at {dict(found.sizes)})"
        else:
            report.measurements.extend(measure_workload(workload, dict(found.sizes), device, stopwatch, limits))
    return report


def measure_workload(
    workload: Workload, checked_at: dict[str, int], device: torch.device, stopwatch: Stopwatch, limits: Limits
) -> list[Measurement]:
    """Times of every pass by every implementation; what fails is told, unless it is the kernel."""
    costs = passes(workload)
    timings: dict[str, dict[str, Timing]] = {of: {} for of in costs}
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    calls: dict[str, Call] = {
        KERNEL: workload.kernel,
        PLAIN: workload.plain,
        COMPILED: torch.compile(workload.plain, dynamic=False),
        **workload.rivals,
    }
    for name, call in calls.items():
        try:
            trial = Trial(call, workload.inputs(workload.sizes, workload.dtype, device))
            measured = {of: timed(stopwatch, *_timed_and_not(trial, of)) for of in costs}
            run, prepare = _timed_and_not(trial, list(costs)[-1])
            prepare()
            peaks[name] = stopwatch.peak_bytes(run)
        except Exception as error:  # a rival that runs out of memory says something too
            if name == KERNEL:
                raise
            failed[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        else:
            for of, timing in measured.items():
                timings[of][name] = timing
    torch.compiler.reset()
    return [
        Measurement(
            op=workload.op,
            workload=workload.name,
            of=of,
            checked_at=checked_at,
            least_bytes=sum(cost.bytes for cost in cost_of),
            least_flops=sum(cost.flops for cost in cost_of),
            least_ms=sum(limits.least_ms(cost, workload.dtype) for cost in cost_of),
            timings=timings[of],
            peak_bytes=peaks,
            failed=failed,
        )
        for of, cost_of in costs.items()
    ]


def passes(workload: Workload) -> dict[str, list[Cost]]:
    """What is timed, the whole last, and the least work of it."""
    forward = workload.forward(workload.sizes)
    if workload.backward is None:
        return {"forward": [forward]}
    backward = workload.backward(workload.sizes)
    return {"forward": [forward], "backward": [backward], "both": [forward, backward]}


def _timed_and_not(trial: Trial, of: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The call that is timed, and what comes before it."""
    if of == "forward":
        return trial.forward, trial.prepare

    def from_the_start() -> None:
        trial.prepare()
        trial.forward()

    def both() -> None:
        trial.forward()
        trial.backward()

    return (trial.backward, from_the_start) if of == "backward" else (both, trial.prepare)


def describe_machine(device: torch.device) -> dict[str, str]:
    """What a number means nothing without."""
    import triton

    commit = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40")
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 if a kernel is wrong or there is no GPU."""
    workloads = all_workloads()
    ops = sorted({workload.op for workload in workloads})
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Measure every kernel on a GPU.")
    parser.add_argument("--op", choices=ops, nargs="+", default=ops, help="operations; default: all")
    parser.add_argument("--dry", action="store_true", help="list what would run; needs no GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON; a plot goes beside it, as FILE.svg")
    chosen = parser.parse_args(arguments)
    workloads = [workload for workload in workloads if workload.op in chosen.op]
    if chosen.dry:
        for workload in workloads:
            print(f"{workload.name}: {', '.join(passes(workload))}; {', '.join([PLAIN, COMPILED, *workload.rivals])}")
        print(f"{len(workloads)} workloads of {len(chosen.op)} operations")
        return 0
    if not torch.cuda.is_available():
        print("Kernels are measured on a CUDA GPU; there is none here. --dry lists what would run.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    stopwatch, machine = CudaStopwatch(device), describe_machine(device)
    report = measure(workloads, device, stopwatch, measure_limits(stopwatch, device), machine)
    print("\n".join(bench_report.machine_lines(report.machine, report.limits)))
    print(bench_report.table(report))
    if chosen.output is not None:
        chosen.output.write_text(bench_report.to_json(report))
        if not bench_report.plot(report, chosen.output.with_suffix(".svg")):
            print("no plot: matplotlib is not installed")
    return int(bool(report.refused))


if __name__ == "__main__":
    sys.exit(main())
