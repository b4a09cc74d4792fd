"""How every candidate is measured, and what it has to reach to be published."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flows.config.checks import require, require_fraction, require_positive
from flows.config.steps import StepConfig


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """What a candidate has to reach; each ratio is against the candidate it was made from, or `base`."""

    beat_unigram: bool = True
    """Bits per byte must be below those of a unigram model of the same tokens; where labels are told apart, accuracy
    above that of always naming the test split's most frequent one."""
    max_loss_ratio: float = 1.35
    """Test loss over the base model's."""
    max_loss: float | None = None
    """Test loss of any candidate, nats per token; null = no limit."""
    max_divergence: float | None = None
    """KL(base || candidate) on the test split, nats per token; null = no limit."""
    min_agreement: float | None = None
    """Share of test tokens for which a candidate's first choice is the base model's; null = no limit."""
    max_8bit_loss_ratio: float = 1.01
    """Test loss of a candidate with 8-bit weights over its source's."""
    max_8bit_bytes_ratio: float = 0.3
    """Bytes of its program over its source's."""
    max_4bit_loss_ratio: float = 1.03
    """Test loss of a candidate with 4-bit weights over its source's."""
    max_4bit_bytes_ratio: float = 0.17
    """Bytes of its program over its source's."""
    max_compressed_bytes_ratio: float = 0.98
    """Bytes of a student's or pruned candidate's program over its source's: one that is as large is not compressed."""
    max_compressed_latency_ratio: float = 1.0
    """p50 latency of a candidate over its source's: one that is slower is not compressed."""

    def __post_init__(self) -> None:
        ratios = ["max_loss_ratio", "max_compressed_bytes_ratio", "max_compressed_latency_ratio"]
        ratios += [f"max_{bits}bit_{measure}_ratio" for bits in (8, 4) for measure in ("loss", "bytes")]
        given = [name for name in ("max_loss", "max_divergence") if getattr(self, name) is not None]
        require_positive("evaluate.gates", self, [*ratios, *given])
        require_fraction("evaluate.gates", self, [] if self.min_agreement is None else ["min_agreement"])


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """How long programs take, in this process; candidates take turns so that a busy machine is fair to all."""

    batch_size: int = 1
    """Rows of a timed request."""
    throughput_batch_size: int = 8
    """Rows of a request where throughput counts; so many fewer requests that as many rows are timed."""
    tokens: int = 128
    """Length of a timed request."""
    requests: int = 200
    """Timed requests per candidate, after a tenth as many for warm-up."""

    def __post_init__(self) -> None:
        require_positive("evaluate.latency", self, ["batch_size", "tokens"])
        require(
            self.requests >= 20,
            "evaluate.latency.requests",
            self.requests,
            "must be 20 or more for a p95 to mean anything",
            "Set evaluate.latency.requests=200.",
        )
        require(
            self.throughput_batch_size >= self.batch_size,
            "evaluate.latency.throughput_batch_size",
            self.throughput_batch_size,
            f"must not be smaller than evaluate.latency.batch_size={self.batch_size}",
            f"Set evaluate.latency.throughput_batch_size={8 * self.batch_size}.",
        )


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Tasks of the language model evaluation harness (`lm_eval`, extra `harness`)."""

    directory: Path | None = None
    """Directory of task files (YAML) with their data beside them; each candidate runs all. null = none."""
    max_examples: int | None = None
    """First examples of each task; null = all."""

    def __post_init__(self) -> None:
        require_positive("evaluate.tasks", self, [] if self.max_examples is None else ["max_examples"])


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How every candidate is measured, alike."""

    max_tokens: int = 131_072
    """Test tokens read for loss and bits per byte."""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)

    def __post_init__(self) -> None:
        require_positive("evaluate", self, ["max_tokens"])


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What a candidate's loss on the test split depends on, besides the candidate."""

    max_tokens: int
    sequence_length: int
    """Context, in tokens."""
    document_masks: bool = False
    """Whether documents that share a sequence are told apart."""
    mixture: dict[str, int] = field(default_factory=dict)
    """Weight of each corpus by name; empty = there is one."""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    kept_for_others: bool = False
    """Whether there are candidates to compare with the base model, so that what it computed has to be kept."""


@dataclass(frozen=True, kw_only=True)
class GatingConfig:
    """What the choice among the candidates depends on, besides their measurements."""

    steps: dict[str, StepConfig]
    """How each candidate but the base model was made."""
    gates: GatesConfig
    candidate: str
    """Which one the user wants: `auto` or a name."""
    weight_bits: dict[str, int] = field(default_factory=dict)
    """Bits of a stored weight of the quantized candidates, by name."""
    sparse: dict[str, str] = field(default_factory=dict)
    """Candidates with zeros among their weights, by name: which share, or `2:4`."""
