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
from flows.evaluation.pareto import front

QUALITY, PROGRAM = "quality:", "program:"
"""What the roles of a candidate's measurements start with; its name follows."""
COSTS = ("program_bytes", "p50_ms")
"""What quality is weighed against."""


@dataclass(frozen=True)
class Row:
    """One candidate in the table."""

    name: str
    source: str | None
    """What it was made from; None for the base model."""
    kind: StepKind | None
    """How; None for the base model."""
    loss: float
    """Nats per test token, or per text where labels are told apart."""
    bits_per_byte: float | None
    """None where labels are told apart."""
    perplexity: float
    accuracy: float
    parameters: int
    program_bytes: int
    p50_ms: float
    p95_ms: float
    throughput: float
    """Tokens per second at the larger batch size."""
    word_accuracy: float | None
    agreement: float
    divergence: float
    """KL(base || candidate), nats per test token."""
    resident_bytes: int
    """Of a process that runs its program."""
    cpu_s_per_1000_tokens: float
    tasks: Mapping[str, float]
    """Results of the evaluation harness by task and measure."""
    macro_f1: float | None = None
    """Where labels are told apart."""
    weight_bits: int | None = None
    """Of a quantized candidate."""
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
    fronts: tuple[str, ...] = ()
    """Costs for which it is on the Pareto front against loss, out of `COSTS`."""


def build(directory: Path, config: GatingConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes gates.json.

    Args:
        directory: Where it goes.
        config: The gates, and which candidate is wanted.
        parents: `quality:<name>` and `program:<name>` of every candidate, `latency`, `baselines`.

    Returns:
        `candidates` (the rows, in the order of `parents`), `chosen` (a name or None) and `choice`, a sentence on why.
    """
    known = parents["baselines"].metrics
    baseline = known["majority_accuracy"] if "majority_accuracy" in known else known["unigram_bits_per_byte"]
    rows = judge(_measured(parents, config), config.gates, baseline)
    chosen, choice = choose(rows, config.candidate)
    metrics = {"candidates": [asdict(row) for row in rows], "chosen": chosen, "choice": choice}
    write_json_atomically(directory / "gates.json", metrics)
    return metrics


def judge(rows: list[Row], gates: GatesConfig, baseline: float) -> list[Row]:
    """The rows with ratios, verdicts, reasons and Pareto fronts filled in.

    Args:
        rows: Every candidate as measured; each one's source is among them.
        gates: What has to be reached.
        baseline: Bits per byte of a model that knows only how frequent each token is; where labels are told apart, the
            accuracy of always naming the most frequent one.
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
        reasons = tuple(_failures(row, by_name, gates, baseline))
        judged.append(replace(row, passed=not reasons, reasons=reasons))
    fronts = {cost: front(judged, cost) for cost in COSTS}
    return [replace(row, fronts=tuple(cost for cost in COSTS if row.name in fronts[cost])) for row in judged]


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
                macro_f1=quality["macro_f1"],
                parameters=program["parameters"],
                program_bytes=program["program_bytes"],
                p50_ms=timing["p50_ms"],
                p95_ms=timing["p95_ms"],
                throughput=timing["throughput"]["tokens_per_s"],
                word_accuracy=quality["word_accuracy"],
                agreement=quality["agreement"],
                divergence=quality["divergence"],
                resident_bytes=timing["resident_bytes"],
                cpu_s_per_1000_tokens=timing["cpu_s_per_1000_tokens"],
                tasks=quality["tasks"],
                weight_bits=config.weight_bits.get(name),
                start=steps[name].start if name in steps else None,
                faults=tuple(quality["faults"]),
                sparse=config.sparse.get(name),
            )
        )
    return rows


def _failures(row: Row, by_name: Mapping[str, Row], gates: GatesConfig, baseline: float) -> Iterator[str]:
    yield from row.faults
    if not math.isfinite(row.loss):
        yield f"test loss is {row.loss}"
    if gates.beat_unigram and row.bits_per_byte is not None and not row.bits_per_byte < baseline:
        yield f"bits per byte {row.bits_per_byte:.4g} does not beat the unigram model's {baseline:.4g}"
    if gates.beat_unigram and row.bits_per_byte is None and not row.accuracy > baseline:
        yield f"accuracy {row.accuracy:.4g} does not beat the {baseline:.4g} of always naming the most frequent label"
    if gates.max_loss is not None and not row.loss <= gates.max_loss:
        yield f"test loss {row.loss:.4g} is above evaluate.gates.max_loss={gates.max_loss:g}"
    if row.source is None:
        return
    source, base = by_name[row.source], by_name[BASE]
    if gates.max_divergence is not None and not row.divergence <= gates.max_divergence:
        limit = f"evaluate.gates.max_divergence={gates.max_divergence:g}"
        yield f"KL from {base.name} {row.divergence:.4g} nats per token is above {limit}"
    if gates.min_agreement is not None and not row.agreement >= gates.min_agreement:
        limit = f"evaluate.gates.min_agreement={gates.min_agreement:g}"
        yield f"agreement with {base.name} {row.agreement:.4g} is below {limit}"
    yield from _above("test loss", row.loss, base, base.loss, gates.max_loss_ratio, "max_loss_ratio")
    size, of_source = row.program_bytes / 1e6, source.program_bytes / 1e6
    if row.weight_bits is not None:
        most_loss, most_bytes = {
            8: (gates.max_8bit_loss_ratio, gates.max_8bit_bytes_ratio),
            4: (gates.max_4bit_loss_ratio, gates.max_4bit_bytes_ratio),
        }[row.weight_bits]
        name = f"max_{row.weight_bits}bit"
        yield from _above("test loss", row.loss, source, source.loss, most_loss, f"{name}_loss_ratio")
        yield from _above("program size in MB", size, source, of_source, most_bytes, f"{name}_bytes_ratio")
    else:
        most = gates.max_compressed_bytes_ratio
        yield from _above("program size in MB", size, source, of_source, most, "max_compressed_bytes_ratio")
        if row.sparse == TWO_OF_FOUR:
            yield (
                "2:4 sparsity is run by sparse tensor cores of NVIDIA GPUs from compute capability 8.0 on; its program "
                "is dense and stores and multiplies every zero. Prune to a smaller shape instead"
            )
        elif row.sparse is not None:
            yield f"{row.sparse} of its layers' weights are zeros, which its program stores and multiplies like others"
    most = gates.max_compressed_latency_ratio
    yield from _above("p50 latency in ms", row.p50_ms, source, source.p50_ms, most, "max_compressed_latency_ratio")


def _above(what: str, value: float, reference: Row, of_reference: float, limit: float, name: str) -> Iterator[str]:
    if not value / of_reference <= limit:
        yield (
            f"{what} {value:.4g} is {value / of_reference:.4g} x the {of_reference:.4g} of {reference.name}, "
            f"above evaluate.gates.{name}={limit:g}"
        )
