"""The typed configuration: composed once by `flows.compose`, frozen, handed to library code and to ranks as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from flows.config.checks import ConfigError, RunError, require
from flows.config.compression import EvaluateConfig, GatingConfig, QualityConfig
from flows.config.data import DataConfig, Format, corpus_section
from flows.config.distillation import check_against_teacher
from flows.config.engine import EngineConfig
from flows.config.hardware import PlanConfig
from flows.config.json_form import flat_settings, from_json, from_plain, to_json, to_plain, with_settings
from flows.config.launcher import LauncherConfig
from flows.config.manifests import ManifestsConfig
from flows.config.model import Architecture, Family, ModelConfig
from flows.config.monitoring import MonitorConfig
from flows.config.predict import PredictConfig
from flows.config.prune import PruneConfig, PruningConfig, pruned_shape
from flows.config.quantize import QuantizeConfig, QuantizingConfig, check_quantized_shape
from flows.config.serving import (
    AUTO_CANDIDATE,
    NO_CANDIDATE,
    CacheDtype,
    EntryConfig,
    ExportConfig,
    GenerationConfig,
    PassportConfig,
    PublishConfig,
    ServeConfig,
    SplitConfig,
    VerifyConfig,
)
from flows.config.steps import BASE, StepConfig, StepKind, check_steps
from flows.config.students import check_students, student_shape
from flows.config.tracking import TrackingConfig
from flows.config.training import DistillConfig, Objective, TrainConfig, TrainingRun
from flows.config.tuning import TuneConfig

__all__ = ["Config", "ConfigError", "RunError", "flat_settings", "from_json", "from_plain", "to_json", "to_plain"]


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
    steps: dict[str, StepConfig] = field(default_factory=dict)
    """Candidates besides the base model, by name, each made from one before it, e.g. {student: {distill: base}}."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    manifests: ManifestsConfig = field(default_factory=ManifestsConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.name) and "/" not in self.name and not self.name.startswith("."),
            "name",
            self.name,
            "must be usable as a directory name",
            "Set name=my_run.",
        )
        check_steps(self.steps)
        require(
            self.publish.candidate in (AUTO_CANDIDATE, NO_CANDIDATE, *self.candidates),
            "publish.candidate",
            self.publish.candidate,
            f"is not a candidate of this run, which makes {self.candidates}",
            f"Set publish.candidate={AUTO_CANDIDATE}, one of them, or {NO_CANDIDATE}.",
        )
        if self.model.architecture == Architecture.transformers:
            require(
                not self.steps,
                "steps",
                list(self.steps),
                f"cannot be combined with model.architecture={self.model.architecture}: they know our decoder only",
                "Set steps=none.",
            )
            require(
                not self.data.document_masks or self.model.family != Family.causal_lm,
                "data.document_masks",
                self.data.document_masks,
                f"cannot be combined with model.architecture={self.model.architecture}: it knows no document ids",
                "Set data.document_masks=false.",
            )
            require(
                self.export.cache_dtype == CacheDtype.float32,
                "export.cache_dtype",
                self.export.cache_dtype,
                f"cannot be combined with model.architecture={self.model.architecture}: its texts are computed from "
                "their beginning each time, nothing of them is kept",
                "Set export.cache_dtype=float32.",
            )
            require(
                self.export.pipeline_stages == 1,
                "export.pipeline_stages",
                self.export.pipeline_stages,
                f"cannot be combined with model.architecture={self.model.architecture}: its layers are not ours to cut",
                "Set export.pipeline_stages=1.",
            )
        if self.model.family != Family.causal_lm:
            self._check_unpublished()
        self._check_formats()
        for section, model in {"model": self.model, "distill.student": self.distill.student}.items():
            weights = model.initial_weights
            require(
                weights is None or self.data.tokenizer.directory is not None,
                f"{section}.initial_weights",
                weights,
                "know the tokens that they were trained on and no others, and data.tokenizer.directory is null",
                f"Set data.tokenizer.directory={weights}, which must hold its tokenizer.json.",
            )
        for name, corpus in self.data.corpora.items():
            for field_name in ("validation_fraction", "test_fraction"):
                require(
                    getattr(corpus, field_name) > 0,
                    f"{corpus_section(name)}.{field_name}",
                    getattr(corpus, field_name),
                    "leaves no text to measure on: models are compared on documents that they were not trained on",
                    f"Set {corpus_section(name)}.{field_name}=0.03.",
                )
        fitting = [length for length in self.verify.lengths if length <= self.data.sequence_length] or [1]
        for length in self.verify.lengths:
            require(
                length <= self.data.sequence_length,
                "verify.lengths",
                list(self.verify.lengths),
                f"must not exceed data.sequence_length={self.data.sequence_length}",
                f"Set verify.lengths={fitting}.",
            )
        require(
            self.evaluate.latency.tokens <= self.data.sequence_length,
            "evaluate.latency.tokens",
            self.evaluate.latency.tokens,
            f"must not exceed data.sequence_length={self.data.sequence_length}",
            f"Set evaluate.latency.tokens={self.data.sequence_length}.",
        )
        for name in self.steps:
            self.step_settings(name)
        self.training_runs()
        check_students(self)
        self._check_stages()
        self.passport()

    def _check_stages(self) -> None:
        for name, shape in self.shapes().items():
            require(
                self.export.pipeline_stages <= shape.num_hidden_layers
                or self.publish.candidate not in (AUTO_CANDIDATE, name),
                "export.pipeline_stages",
                self.export.pipeline_stages,
                f"must not exceed the {shape.num_hidden_layers} layers of {name}, which may be published",
                f"Set export.pipeline_stages={shape.num_hidden_layers}, or publish.candidate to a deeper one.",
            )

    def _check_unpublished(self) -> None:
        require(
            self.publish.candidate == NO_CANDIDATE,
            "publish.candidate",
            self.publish.candidate,
            f"cannot be combined with model.family={self.model.family}: what is served and verified is the next token",
            f"Set publish.candidate={NO_CANDIDATE}: the model is trained, measured and kept, and nothing is published.",
        )
        require(
            self.evaluate.tasks.directory is None,
            "evaluate.tasks.directory",
            self.evaluate.tasks.directory,
            f"cannot be combined with model.family={self.model.family}: tasks ask for the likelihood of what follows",
            "Set evaluate.tasks.directory=null.",
        )

    def _check_formats(self) -> None:
        family = self.model.family
        classifies = family == Family.sequence_classification
        for corpus in self.data.corpora.values():
            require(
                corpus.format == Format.text or family != Family.masked_lm,
                "data.corpus.format",
                corpus.format,
                f"cannot be combined with model.family={family}: tokens are hidden in plain text",
                "Set data.corpus.format=text.",
            )
            require(
                (corpus.format == Format.labelled) == classifies,
                "data.corpus.format",
                corpus.format,
                f"cannot be combined with model.family={family}: labels are what is learnt by "
                f"{Family.sequence_classification}, and by nothing else",
                f"Set data.corpus.format={Format.labelled if classifies else Format.text}, or another model.family.",
            )
        require(
            not (classifies and self.train.lora.enabled),
            "train.lora.rank",
            self.train.lora.rank,
            f"cannot be combined with model.family={family}: adapters leave the head, which is new, as it was drawn",
            "Set train.lora.rank=0; train.freeze=[*.encoder.*] keeps most weights as they are.",
        )

    @property
    def candidates(self) -> list[str]:
        """Names of all models that the run makes, in the order in which it makes them."""
        return [BASE, *self.steps]

    @property
    def trained_candidates(self) -> list[str]:
        """Names of the models that are trained."""
        return [BASE, *(name for name, step in self.steps.items() if step.kind == StepKind.distill)]

    def step_settings(self, name: str) -> DistillConfig | PruneConfig | QuantizeConfig:
        """The section that a step uses, with the step's own settings."""
        step = self.steps[name]
        section: DistillConfig | PruneConfig | QuantizeConfig = getattr(self, step.kind)
        return with_settings(section, step.settings, step.kind, f"steps.{name}.settings") if step.settings else section

    def shapes(self) -> dict[str, ModelConfig]:
        """Shape of each candidate, known before any of them is made."""
        shapes = {BASE: self.model}
        for name, step in self.steps.items():
            match self.step_settings(name):
                case DistillConfig() as distill:
                    shapes[name] = student_shape(name, step, distill, shapes)
                case PruneConfig() as prune:
                    shapes[name] = pruned_shape(shapes[step.source], prune, step.source)
                case QuantizeConfig() as quantize:
                    shapes[name] = shapes[step.source]
                    check_quantized_shape(shapes[name], quantize, step.source)
        return shapes

    def sparse_candidates(self) -> dict[str, str]:
        """Candidates with zeros among their weights, by name: how many and in which pattern, in words."""
        growing = self.train.sparsify.sparsity
        sparse = {BASE: f"{growing:g}"} if growing else {}
        for name, step in self.steps.items():
            settings = self.step_settings(name)
            if isinstance(settings, PruneConfig) and settings.sparsity:
                sparse[name] = settings.pattern or f"{settings.sparsity:g}"
                continue
            if isinstance(settings, DistillConfig) and settings.train.sparsify.sparsity:
                sparse[name] = f"{settings.train.sparsify.sparsity:g}"
                continue
            source: str | None = step.source
            if isinstance(settings, DistillConfig) and not (settings.student_layers or settings.student_every):
                source = step.start
            if source in sparse:
                sparse[name] = sparse[source]
        return sparse

    def weight_bits(self) -> dict[str, int]:
        """Bits of a stored weight of each quantized candidate, by name."""
        settings = {name: self.step_settings(name) for name in self.steps}
        return {name: one.weight_bits for name, one in settings.items() if isinstance(one, QuantizeConfig)}

    def training_runs(self) -> dict[str, TrainingRun]:
        """Training of the base model, and of each student, by candidate."""
        shapes, sparse = self.shapes(), self.sparse_candidates()
        runs = {BASE: self._training_run(Objective.cross_entropy, self.model, self.train)}
        for name in self.trained_candidates[1:]:
            distill, start = self.step_settings(name), self.steps[name].start
            assert isinstance(distill, DistillConfig)
            teacher = shapes[self.steps[name].source]
            layers = distill.layers_of(teacher.num_hidden_layers)
            student = replace(shapes[name], initial_weights=None) if start or layers else distill.student
            runs[name] = replace(
                self._training_run(Objective.distillation, student, distill.train),
                temperature=distill.temperature,
                alpha=distill.alpha,
                divergence=distill.divergence,
                jsd_beta=distill.jsd_beta,
                cache_top_k=distill.cache.top_k,
                hidden=distill.hidden,
                relations=distill.relations,
                on_policy_share=distill.on_policy_share,
                generation=distill.generation,
                student_layers=layers,
                start=start,
                keep_zeros=name in sparse,
            )
            check_against_teacher(runs[name], teacher, self.steps[name].source)
        return runs

    def pruning(self, name: str) -> PruningConfig:
        """What a step of kind `prune` does."""
        settings = self.step_settings(name)
        assert isinstance(settings, PruneConfig)
        return PruningConfig(
            prune=settings,
            sequence_length=self.data.sequence_length,
            document_masks=self.data.document_masks,
            mixture=self.data.weights,
        )

    def quantizing(self, name: str) -> QuantizingConfig:
        """What a step of kind `quantize` does."""
        settings = self.step_settings(name)
        assert isinstance(settings, QuantizeConfig)
        return QuantizingConfig(
            quantize=settings,
            sequence_length=self.data.sequence_length,
            document_masks=self.data.document_masks,
            mixture=self.data.weights,
        )

    def quality(self) -> QualityConfig:
        """Measurement of each candidate on the test split."""
        return QualityConfig(
            max_tokens=self.evaluate.max_tokens,
            tasks=self.evaluate.tasks,
            sequence_length=self.data.sequence_length,
            document_masks=self.data.document_masks,
            mixture=self.data.weights,
            kept_for_others=bool(self.steps),
        )

    def gating(self) -> GatingConfig:
        """Choice among the candidates."""
        return GatingConfig(
            steps=self.steps,
            gates=self.evaluate.gates,
            candidate=self.publish.candidate,
            weight_bits=self.weight_bits(),
            sparse=self.sparse_candidates(),
        )

    def generation(self) -> GenerationConfig:
        """Program of the chosen candidate that generates text."""
        return GenerationConfig(cache_dtype=self.export.cache_dtype, pipeline_stages=self.export.pipeline_stages)

    def split(self) -> SplitConfig:
        """Program of the chosen candidate in parts, for several ranks."""
        return SplitConfig(pipeline_stages=self.export.pipeline_stages)

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
