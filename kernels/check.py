# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""Compiles every kernel launch for GPUs that need not be here: `python -m kernels.check`.

Each workload runs on small CPU tensors while launching is replaced by compiling, so that what is checked is what a GPU
would get: the same specialization, options and constants. Fails on what does not compile, spills registers or needs
more shared memory than the part has. With `--strict` it also fails on what is worse than `check_baseline.json` says:
see `kernels.check_baseline` for the rule.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton

from kernels import check_baseline
from kernels.binary import PROCESSORS, Compiled
from kernels.compile_only import compile_launches, launches
from kernels.dispatch import INTERPRETED, KernelError
from kernels.workloads import Workload, all_workloads


@dataclass(frozen=True)
class Outcome:
    """What became of one workload on one architecture."""

    workload: str
    architecture: int
    compiled: list[Compiled]
    skipped: str | None = None
    """Why the operation refuses to run there."""
    failure: str | None = None
    """Why it does not compile."""


def compile_workload(workload: Workload, architecture: int) -> Outcome:
    """Every variant that the workload launches; a refusal and a failure are told, not raised."""
    try:
        return Outcome(workload.name, architecture, compile_launches([launches(workload)], architecture))
    except KernelError as refusal:
        return Outcome(workload.name, architecture, [], skipped=str(refusal))
    except Exception as error:  # whatever a compiler raises: the other launches are still to be checked
        lines = str(error).strip().splitlines() or [""]
        return Outcome(workload.name, architecture, [], failure=f"{type(error).__name__}: {lines[-1]}")


def outcomes(workloads: list[Workload], architectures: list[int], processes: int) -> Iterator[Outcome]:
    """Of each workload on each architecture, in order of architectures."""
    tasks = [(workload, architecture) for architecture in architectures for workload in workloads]
    if processes == 1:
        yield from (compile_workload(*task) for task in tasks)
        return
    named = [(workload.name, architecture) for workload, architecture in tasks]  # functions do not travel
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_by_name, *zip(*named, strict=True))


def _compile_by_name(name: str, architecture: int) -> Outcome:
    return compile_workload(next(each for each in all_workloads() if each.name == name), architecture)


def main(arguments: list[str] | None = None) -> int:
    """Prints what every launch compiles to; returns 1 if any of it is at fault."""
    chosen, workloads = _parsed(arguments)
    baseline = check_baseline.load(chosen.baseline) if chosen.strict else None
    print(f"triton {triton.__version__}\n{'kernel':36} {'sm':>3} {'registers':>9} {'spills':>6} {'shared':>6} ", end="")
    print(f"{'blocks':>6} {'matrix units':13} variant")
    seen: dict[tuple[str, str, int], Compiled] = {}
    faults = 0
    for outcome in outcomes(workloads, chosen.architecture, chosen.processes):
        if outcome.skipped is not None or outcome.failure is not None:
            faults += outcome.failure is not None
            what = "skipped" if outcome.failure is None else "<-- does not compile"
            print(f"{outcome.workload}, sm_{outcome.architecture}: {what}: {outcome.failure or outcome.skipped}")
        for made in outcome.compiled:
            key = made.kernel, made.variant, made.architecture
            if seen.get(key) == made:
                continue
            fault = made.fault or (baseline and baseline.fault(made))
            if key in seen:
                fault = "differs from another launch of the same name: a variant has to say what tells it from others"
            seen[key] = made
            faults += fault is not None
            print(_row(made) + (f"  <-- {fault}" if fault else ""))
    if baseline is not None and set(chosen.op) == {workload.op for workload in all_workloads()}:
        for gone in baseline.missing(seen, chosen.architecture):
            faults += 1
            print(f"{gone}  <-- in the baseline, and launched by no workload")
    if chosen.write_baseline and not faults:
        check_baseline.write(chosen.baseline, seen.values(), chosen.architecture)
    print(f"{faults} at fault" if faults else "all sound")
    return int(faults > 0)


def _parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, list[Workload]]:
    workloads = all_workloads()
    ops = sorted({workload.op for workload in workloads})
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description="Compile every kernel without a GPU.")
    parser.add_argument("--op", choices=ops, nargs="+", default=ops, help="operations; default: all")
    parser.add_argument("--architecture", type=int, choices=PROCESSORS, nargs="+", default=list(PROCESSORS))
    parser.add_argument("--strict", action="store_true", help="fail on what is worse than the baseline, or not in it")
    parser.add_argument("--write-baseline", action="store_true", help="make what is sound now the baseline; all ops")
    parser.add_argument("--baseline", type=Path, default=check_baseline.FILE)
    parser.add_argument("--processes", type=int, default=1, help="that compile at a time")
    chosen = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them. Unset it.")
    if chosen.write_baseline and (chosen.strict or chosen.op != ops):
        parser.error("--write-baseline writes what it finds, for all operations. Leave out --strict and --op.")
    return chosen, [workload for workload in workloads if workload.op in chosen.op]


def _row(made: Compiled) -> str:
    return (
        f"{made.kernel:36} {made.architecture:3} {made.registers:9} {made.spill_instructions:6} "
        f"{made.shared_bytes:6} {made.blocks:6} {'+'.join(made.matrix_units) or 'none':13} {made.variant}"
    )


if __name__ == "__main__":
    sys.exit(main())
