"""The typed configuration: composed once by `flows.compose`, frozen, handed to library code and to ranks as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from flows.config.checks import ConfigError, RunError, require
from flows.config.compression import EvaluateConfig, GatingConfig, QualityConfig, QuantizeConfig
from flows.config.data import DataConfig
from flows.config.engine import EngineConfig
from flows.config.hardware import PlanConfig
from flows.config.launcher import LauncherConfig
from flows.config.model import Architecture, ModelConfig
from flows.config.serving import (
    AUTO_CANDIDATE,
    EntryConfig,
    ExportConfig,
    PassportConfig,
    PublishConfig,
    ServeConfig,
    VerifyConfig,
)
from flows.config.tracking import TrackingConfig
from flows.config.training import DistillConfig, Objective, TrainConfig, TrainingRun

__all__ = ["Config", "ConfigError", "RunError", "flat_settings", "from_json", "to_json", "to_plain"]

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run of the chain."""

    name: str = "millrace"
    """Name of the run; a rerun under the same name is explained against the run before."""
    seed: int = 0
    """Seed of initial weights, sample order and fresh verification inputs."""
    artifacts_dir: Path = Path("artifacts")
    """Where artifacts, run records and reports are kept."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.name) and "/" not in self.name and not self.name.startswith("."),
            "name",
            self.name,
            "must be usable as a directory name",
            "Set name=my_run.",
        )
        for source in self.quantized_sources:
            require(
                source in self.trained_candidates,
                "quantize.sources",
                list(self.quantize.sources),
                f"names {source!r}, which this run does not train; it trains {self.trained_candidates}",
                "Set quantize.sources=[base].",
            )
        require(
            self.publish.candidate in (AUTO_CANDIDATE, *self.candidates),
            "publish.candidate",
            self.publish.candidate,
            f"is not a candidate of this run, which makes {self.candidates}",
            f"Set publish.candidate={AUTO_CANDIDATE}, or one of them.",
        )
        if self.model.architecture == Architecture.transformers:
            for section, setting in {"distill": self.distill.enabled, "quantize": self.quantize.enabled}.items():
                require(
                    not setting,
                    f"{section}.enabled",
                    setting,
                    f"cannot be combined with model.architecture={self.model.architecture}: it knows our decoder only",
                    f"Set {section}=none.",
                )
            require(
                not self.data.document_masks,
                "data.document_masks",
                self.data.document_masks,
                f"cannot be combined with model.architecture={self.model.architecture}: it knows no document ids",
                "Set data.document_masks=false.",
            )
        for section, model in {"model": self.model, "distill.student": self.distill.student}.items():
            weights = model.initial_weights
            require(
                weights is None or self.data.tokenizer.directory is not None,
                f"{section}.initial_weights",
                weights,
                "know the tokens that they were trained on and no others, and data.tokenizer.directory is null",
                f"Set data.tokenizer.directory={weights}, which must hold its tokenizer.json.",
            )
        for length in self.verify.lengths:
            require(
                length <= self.data.sequence_length,
                "verify.lengths",
                list(self.verify.lengths),
                f"must not exceed data.sequence_length={self.data.sequence_length}",
                "Set shorter verify.lengths.",
            )
        require(
            self.evaluate.latency.tokens <= self.data.sequence_length,
            "evaluate.latency.tokens",
            self.evaluate.latency.tokens,
            f"must not exceed data.sequence_length={self.data.sequence_length}",
            f"Set evaluate.latency.tokens={self.data.sequence_length}.",
        )
        self.base_run()
        if self.distill.enabled:
            self.student_run()
        self.passport()

    @property
    def trained_candidates(self) -> list[str]:
        """Names of the models that are trained."""
        return ["base", "student"] if self.distill.enabled else ["base"]

    @property
    def quantized_sources(self) -> list[str]:
        """Names of the models that are quantized."""
        return list(self.quantize.sources or self.trained_candidates) if self.quantize.enabled else []

    @property
    def candidates(self) -> list[str]:
        """Names of all models that the run makes, in the order in which it makes them."""
        return self.trained_candidates + [f"{source}_int8" for source in self.quantized_sources]

    def base_run(self) -> TrainingRun:
        """Training of the base model, which is the student's teacher."""
        return self._training_run(Objective.cross_entropy, self.model, self.train)

    def student_run(self) -> TrainingRun:
        """Distillation of the student."""
        run = self._training_run(Objective.distillation, self.distill.student, self.distill.train)
        return replace(
            run,
            temperature=self.distill.temperature,
            alpha=self.distill.alpha,
            divergence=self.distill.divergence,
            jsd_beta=self.distill.jsd_beta,
        )

    def quality(self) -> QualityConfig:
        """Measurement of each candidate on the test split."""
        return QualityConfig(
            max_tokens=self.evaluate.max_tokens,
            sequence_length=self.data.sequence_length,
            document_masks=self.data.document_masks,
            mixture=self.data.weights,
        )

    def gating(self) -> GatingConfig:
        """Choice among the candidates."""
        return GatingConfig(gates=self.evaluate.gates, candidate=self.publish.candidate)

    def entry(self) -> EntryConfig:
        """Model repository entry of the chosen candidate."""
        return EntryConfig(
            model_name=self.publish.model_name,
            keep_versions=self.publish.keep_versions,
            sequence_length=self.data.sequence_length,
            export=self.export,
        )

    def passport(self) -> PassportConfig:
        """Proof that the served model is the trained one."""
        return PassportConfig(
            model_name=self.publish.model_name,
            sequence_length=self.data.sequence_length,
            seed=self.seed,
            export=self.export,
            verify=self.verify,
        )

    def _training_run(self, objective: Objective, model: ModelConfig, train: TrainConfig) -> TrainingRun:
        return TrainingRun(
            objective=objective,
            model=model,
            train=train,
            engine=self.engine,
            launcher=self.launcher,
            tracking=self.tracking,
            sequence_length=self.data.sequence_length,
            seed=self.seed,
            document_masks=self.data.document_masks,
            mixture=self.data.weights,
        )


def to_plain(section: Any) -> Any:
    """The section as JSON-ready values (dict, list, str, number, None)."""
    return TypeAdapter(type(section)).dump_python(section, mode="json")


def flat_settings(section: Any) -> dict[str, Any]:
    """The section as dotted names and JSON-ready values."""

    def walk(plain: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in plain.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(to_plain(section), ""))


def to_json(section: Any) -> str:
    """The section as indented JSON, keys in the order of the schema."""
    return json.dumps(to_plain(section), indent=2) + "\n"


def from_json(section_type: type[Section], text: str) -> Section:
    """The section that `to_json` wrote; every check runs again.

    Raises:
        pydantic.ValidationError: A field is missing, unknown or of the wrong type.
    """
    return TypeAdapter(section_type).validate_json(text)
