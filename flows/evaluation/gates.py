"""Stage: which candidates have earned their place, why the others have not, and which one is to be published."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flows.artifact import Artifact, write_json_atomically
from flows.config.compression import GatesConfig, GatingConfig
from flows.config.prune import TWO_OF_FOUR
from flows.config.serving import AUTO_CANDIDATE, NO_CANDIDATE
from flows.config.steps import BASE, StepKind

QUALITY, PROGRAM = "quality:", "program:"
"""What the roles of a candidate's measurements start with; its name follows."""


@dataclass(frozen=True)
class Row:
    """One candidate in the table."""

    name: str
    source: str | None
    """What it was made from; None for the base model."""
    kind: StepKind | None
    """How; None for the base model."""
    loss: float
    """Nats per test token."""
    bits_per_byte: float
    perplexity: float
    accuracy: float
    parameters: int
    program_bytes: int
    p50_ms: float
    p95_ms: float
    throughput: float
    """Tokens per second at the larger batch size."""
    loss_ratio: float | None = None
    """Over its source's, as are the next two."""
    bytes_ratio: float | None = None
    p50_ratio: float | None = None
    base_loss_ratio: float | None = None
    """Over the base model's."""
    start: str | None = None
    """The candidate that its training started from, where there is one."""
    recovered: float | None = None
    """Share that training won back of the loss by which `start` lies above the source."""
    faults: tuple[str, ...] = ()
    """What makes it no language model at all, whatever its loss."""
    sparse: str | None = None
    """Share of zeros among its weights that pruning asked for, or `2:4`."""
    passed: bool = False
    reasons: tuple[str, ...] = ()
    """A sentence for every gate that it fails."""


def build(directory: Path, config: GatingConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes gates.json.

    Args:
        directory: Where it goes.
        config: The gates, and which candidate is wanted.
        parents: `quality:<name>` and `program:<name>` of every candidate, `latency`, `baselines`.

    Returns:
        `candidates` (the rows, in the order of `parents`), `chosen` (a name or None) and `choice`, a sentence on why.
    """
    unigram = parents["baselines"].metrics["unigram_bits_per_byte"]
    rows = judge(_measured(parents, config), config.gates, unigram)
    chosen, choice = choose(rows, config.candidate)
    metrics = {"candidates": [asdict(row) for row in rows], "chosen": chosen, "choice": choice}
    write_json_atomically(directory / "gates.json", metrics)
    return metrics


def judge(rows: list[Row], gates: GatesConfig, unigram_bits_per_byte: float) -> list[Row]:
    """The rows with ratios, verdicts and reasons filled in.

    Args:
        rows: Every candidate as measured; each one's source is among them.
        gates: What has to be reached.
        unigram_bits_per_byte: Of a model that knows only how frequent each token is.
    """
    by_name = {row.name: row for row in rows}
    judged = []
    for row in rows:
        if row.source is not None:
            source = by_name[row.source]
            row = replace(
                row,
                loss_ratio=row.loss / source.loss,
                bytes_ratio=row.program_bytes / source.program_bytes,
                p50_ratio=row.p50_ms / source.p50_ms,
                base_loss_ratio=row.loss / by_name[BASE].loss,
                recovered=_recovered(row, source, by_name),
            )
        reasons = tuple(_failures(row, by_name, gates, unigram_bits_per_byte))
        judged.append(replace(row, passed=not reasons, reasons=reasons))
    return judged


def choose(rows: list[Row], wanted: str) -> tuple[str | None, str]:
    """The candidate to publish, or None, and a sentence that says why.

    Args:
        rows: Judged candidates.
        wanted: `auto` for the fastest one that passed, a candidate's name, or `none`.
    """
    passed = [row for row in rows if row.passed]
    if wanted == NO_CANDIDATE:
        return None, f"publish.candidate={wanted}: {len(passed)} of {len(rows)} candidates passed the gates"
    if wanted == AUTO_CANDIDATE:
        if not passed:
            failures = "; ".join(f"{row.name}: {', '.join(row.reasons)}" for row in rows)
            return None, f"no candidate passed the gates ({failures})"
        fastest = min(passed, key=lambda row: row.p50_ms)
        return fastest.name, f"the fastest of {len(passed)} candidates that passed the gates, of {len(rows)} made"
    row = next(row for row in rows if row.name == wanted)
    if row.passed:
        return wanted, f"publish.candidate={wanted}, and it passed the gates"
    return None, f"publish.candidate={wanted} failed the gates: {', '.join(row.reasons)}"


def _recovered(row: Row, source: Row, by_name: Mapping[str, Row]) -> float | None:
    if row.start is None or not by_name[row.start].loss > source.loss:
        return None
    return (by_name[row.start].loss - row.loss) / (by_name[row.start].loss - source.loss)


def _measured(parents: Mapping[str, Artifact], config: GatingConfig) -> list[Row]:
    rows: list[Row] = []
    steps = config.steps
    for name in (role.removeprefix(QUALITY) for role in parents if role.startswith(QUALITY)):
        quality = parents[f"{QUALITY}{name}"].metrics
        program = parents[f"{PROGRAM}{name}"].metrics
        timing = parents["latency"].metrics[name]
        rows.append(
            Row(
                name=name,
                source=steps[name].source if name in steps else None,
                kind=steps[name].kind if name in steps else None,
                loss=quality["loss"],
                bits_per_byte=quality["bits_per_byte"],
                perplexity=quality["perplexity"],
                accuracy=quality["accuracy"],
                parameters=program["parameters"],
                program_bytes=program["program_bytes"],
                p50_ms=timing["p50_ms"],
                p95_ms=timing["p95_ms"],
                throughput=timing["throughput"]["tokens_per_s"],
                start=steps[name].start if name in steps else None,
                faults=tuple(quality["faults"]),
                sparse=config.sparse.get(name),
            )
        )
    return rows


def _failures(row: Row, by_name: Mapping[str, Row], gates: GatesConfig, unigram: float) -> Iterator[str]:
    yield from row.faults
    if not math.isfinite(row.loss):
        yield f"test loss is {row.loss}"
    if gates.beat_unigram and not row.bits_per_byte < unigram:
        yield f"bits per byte {row.bits_per_byte:.4g} does not beat the unigram model's {unigram:.4g}"
    if row.source is None:
        return
    source, base = by_name[row.source], by_name[BASE]

    def above(what: str, value: float, reference: Row, of_reference: float, limit: float, name: str) -> Iterator[str]:
        if not value / of_reference <= limit:
            yield (
                f"{what} {value:.4g} is {value / of_reference:.4g} x the {of_reference:.4g} of {reference.name}, "
                f"above evaluate.gates.{name}={limit:g}"
            )

    yield from above("test loss", row.loss, base, base.loss, gates.max_loss_ratio, "max_loss_ratio")
    size, of_source = row.program_bytes / 1e6, source.program_bytes / 1e6
    if row.kind == StepKind.quantize:
        yield from above(
            "test loss", row.loss, source, source.loss, gates.max_quantized_loss_ratio, "max_quantized_loss_ratio"
        )
        yield from above(
            "program size in MB", size, source, of_source, gates.max_quantized_bytes_ratio, "max_quantized_bytes_ratio"
        )
    else:
        yield from above(
            "program size in MB",
            size,
            source,
            of_source,
            gates.max_compressed_bytes_ratio,
            "max_compressed_bytes_ratio",
        )
        if row.sparse == TWO_OF_FOUR:
            yield (
                "2:4 sparsity is run by sparse tensor cores of NVIDIA GPUs from compute capability 8.0 on; its program "
                "is dense and stores and multiplies every zero"
            )
        elif row.sparse is not None:
            yield f"{row.sparse} of its layers' weights are zeros, which its program stores and multiplies like others"
    yield from above(
        "p50 latency in ms",
        row.p50_ms,
        source,
        source.p50_ms,
        gates.max_compressed_latency_ratio,
        "max_compressed_latency_ratio",
    )
