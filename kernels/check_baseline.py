# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""What compiled kernels needed when they were last found good, in `check_baseline.json`.

The rule: a kernel is in the baseline of this version of Triton; it needs no more registers than there, rounded up to
the next step of 8 in which a GPU gives them; no more shared memory; and uses every kind of matrix unit that it used.
What is better than the baseline passes, and stays unprotected until `python -m kernels.check --write-baseline`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

from kernels.binary import REGISTERS_AT_ONCE, Compiled

FILE = Path(__file__).with_name("check_baseline.json")
Needs = tuple[int, int, str]
"""Registers, bytes of shared memory, matrix units joined by "+"."""


@dataclass(frozen=True)
class Baseline:
    """That of this version of Triton."""

    kernels: dict[str, dict[str, dict[str, Needs]]]
    """By kernel, variant and architecture."""

    def fault(self, made: Compiled) -> str | None:
        """What is worse than it was, if anything."""
        before = self.kernels.get(made.kernel, {}).get(made.variant, {}).get(f"sm_{made.architecture}")
        if before is None:
            return f"not in the baseline of triton {triton.__version__}: --write-baseline"
        registers, shared_bytes, units = before
        if made.registers > -(-registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE:
            return f"needs more registers than before: {registers}"
        if made.shared_bytes > shared_bytes:
            return f"needs more shared memory than before: {shared_bytes} bytes"
        lost = {unit for unit in units.split("+") if unit} - set(made.matrix_units)
        return f"no longer uses {', '.join(sorted(lost))}" if lost else None

    def missing(self, made: Collection[tuple[str, str, int]], architectures: Iterable[int]) -> Iterator[str]:
        """What it has for these architectures and what was made (kernel, variant, architecture) has not."""
        for kernel, variants in self.kernels.items():
            for variant, needs in variants.items():
                for architecture in architectures:
                    if f"sm_{architecture}" in needs and (kernel, variant, architecture) not in made:
                        yield f"{kernel} sm_{architecture} {variant}"


def load(path: Path) -> Baseline:
    """The baseline of this version of Triton; an empty one where there is none."""
    return Baseline(_read(path).get(triton.__version__, {}))


def write(path: Path, compiled: Iterable[Compiled], architectures: Iterable[int]) -> None:
    """Makes what was compiled the baseline of this version of Triton for these architectures; the rest stays."""
    versions = _read(path)
    written = {f"sm_{architecture}" for architecture in architectures}
    kernels: dict[str, dict[str, dict[str, Needs]]] = {}
    for kernel, variants in versions.get(triton.__version__, {}).items():
        for variant, by_architecture in variants.items():
            for architecture, needs in by_architecture.items():
                if architecture not in written:
                    kernels.setdefault(kernel, {}).setdefault(variant, {})[architecture] = needs
    for made in compiled:
        needs = (made.registers, made.shared_bytes, "+".join(made.matrix_units))
        kernels.setdefault(made.kernel, {}).setdefault(made.variant, {})[f"sm_{made.architecture}"] = needs
    versions[triton.__version__] = kernels
    path.write_text("{\n" + ",\n".join(_lines(versions)) + "\n}\n")


def _read(path: Path) -> dict[str, dict[str, dict[str, dict[str, Needs]]]]:
    return json.loads(path.read_text()) if path.exists() else {}


def _lines(versions: dict[str, dict[str, dict[str, dict[str, Needs]]]]) -> Iterator[str]:
    """A line for each variant, in order, so that changes can be read."""
    for version, kernels in sorted(versions.items()):
        of_kernels = []
        for kernel, variants in sorted(kernels.items()):
            lines = [
                f"   {json.dumps(name)}: {json.dumps(needs, sort_keys=True)}"
                for name, needs in sorted(variants.items())
            ]
            of_kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
        yield f" {json.dumps(version)}: {{\n" + ",\n".join(of_kernels) + "\n }"
