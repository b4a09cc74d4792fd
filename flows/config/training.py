"""How a model is trained: steps, schedule, objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from flows.config.checks import require, require_fraction, require_positive
from flows.config.distillation import (
    CacheConfig,
    Divergence,
    GenerationConfig,
    HiddenConfig,
    RelationsConfig,
    check_distillation,
)
from flows.config.engine import EngineConfig, Offload
from flows.config.launcher import ELSEWHERE, LauncherConfig
from flows.config.lora import LoraConfig
from flows.config.model import Family, Kernels, ModelConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.parallelism import check_parallelism
from flows.config.quantization_aware import QuantizationAwareConfig
from flows.config.sparsify import SparsifyConfig
from flows.config.tracking import TrackingConfig


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    max_steps: int = 300
    """Optimizer updates."""
    masked_share: float = 0.15
    """Share of the tokens that are hidden at each step, others each time; BERT's (arXiv:1810.04805), more for large
    models (arXiv:2202.08005). Evaluations hide BERT's share. Read for `model.family=masked_lm` only."""
    global_batch_size: int = 16
    """Sequences per optimizer update, over all ranks."""
    micro_batch_size: int = 8
    """Sequences per rank in one forward-backward."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 20
    """Steps in which the learning rate rises linearly to its peak."""
    min_learning_rate_ratio: float = 0.1
    """Last learning rate as a share of the peak, for cosine, linear and wsd."""
    decay_share: float = 0.2
    """Share of all steps in which wsd (warm-up, stable, decay; arXiv:2404.06395) lets the rate fall; more than 0.2
    gains little (arXiv:2405.18392)."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    trainable: tuple[str, ...] = ()
    """Glob patterns of the weights to train, e.g. `lm_head.weight`; empty = all. Others keep every bit."""
    freeze: tuple[str, ...] = ()
    """Glob patterns of weights that keep every bit, e.g. `model.layers.0.*`; comes after `trainable`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    sparsify: SparsifyConfig = field(default_factory=SparsifyConfig)
    quantization_aware: QuantizationAwareConfig = field(default_factory=QuantizationAwareConfig)
    ema_decay: float = 0.0
    """Share of the old average kept at each step of an exponential moving average of the weights, in float32, which is
    then evaluated and saved as the model; 0 = none, 0.999 is usual. Rises with the steps: step / (step + 9) at most."""
    eval_interval_steps: int = 100
    """Validation loss is measured each time this many steps are done, and after the last."""
    eval_tokens: int = 65_536
    """Validation tokens read at each evaluation; the same ones each time."""
    early_stopping_evals: int = 0
    """Stops when the validation loss has not improved for this many evaluations; 0 = never."""
    checkpoint_interval_steps: int = 100
    """A resumable checkpoint is written each time this many steps are done."""
    keep_checkpoints: int = 2
    """Newest resumable checkpoints kept while training, so that a damaged one is not the end."""
    keep_every_steps: int = 0
    """Checkpoints of steps that this divides also stay until the run is complete, to go back to; 0 = none."""
    asynchronous_checkpoints: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory: 12 bytes per parameter with AdamW."""
    log_interval_steps: int = 10
    """Loss, learning rate, gradient norm and tokens per second are logged this often."""

    def __post_init__(self) -> None:
        require_positive(
            "train", self, ["max_steps", "global_batch_size", "micro_batch_size", "eval_interval_steps", "eval_tokens"]
        )
        require_positive("train", self, ["checkpoint_interval_steps", "keep_checkpoints", "log_interval_steps"])
        require_fraction("train", self, ["min_learning_rate_ratio", "decay_share"])
        require(
            0 < self.masked_share < 1,
            "train.masked_share",
            self.masked_share,
            "must be above 0 and below 1: hidden tokens are learnt from those that are left",
            "Set train.masked_share=0.15.",
        )
        require(
            0 <= self.ema_decay < 1,
            "train.ema_decay",
            self.ema_decay,
            "must be 0 or more and below 1, which would keep the first weights for ever",
            "Set train.ema_decay=0.999.",
        )
        require(
            not self.sparsify.sparsity or self.sparsify.end_step <= self.max_steps,
            "train.sparsify.end_step",
            self.sparsify.end_step,
            f"must not exceed train.max_steps={self.max_steps}: there would be fewer zeros than wanted",
            "Set it to two thirds of train.max_steps.",
        )
        for name in ("trainable", "freeze"):
            patterns = list(getattr(self, name))
            require(
                not (patterns and self.lora.enabled),
                f"train.{name}",
                patterns,
                f"cannot be combined with train.lora.rank={self.lora.rank}: adapters freeze every other weight",
                "Name modules to train in full in train.lora.replaced.",
            )
        require(
            self.warmup_steps >= 0,
            "train.warmup_steps",
            self.warmup_steps,
            "must not be negative",
            "Set it to 0 for no warm-up.",
        )
        require(
            self.keep_every_steps >= 0,
            "train.keep_every_steps",
            self.keep_every_steps,
            "must not be negative",
            "Set it to 0 to keep only the newest.",
        )
        require(
            self.early_stopping_evals >= 0,
            "train.early_stopping_evals",
            self.early_stopping_evals,
            "must not be negative",
            "Set it to 0 to never stop early.",
        )
        require(
            self.gradient_clipping >= 0,
            "train.gradient_clipping",
            self.gradient_clipping,
            "must not be negative",
            "Set it to 0 for no clipping.",
        )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A smaller student learns from the trained model: its scores (arXiv:1503.02531), and what else is asked for."""

    student: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            hidden_size=128, intermediate_size=352, num_attention_heads=4, num_key_value_heads=2
        )
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    temperature: float = 2.0
    """Softens both distributions; the loss is scaled by its square so that gradients keep their size."""
    alpha: float = 0.5
    """Weight of the distillation term; 1 - alpha is left to cross-entropy on the data."""
    divergence: Divergence = Divergence.forward_kl
    """What the distillation term is."""
    jsd_beta: float = 0.5
    """Weight of the teacher in the mean distribution that `jsd` measures both from: the nearer to 0, the more like
    forward_kl, the nearer to 1, the more like reverse_kl, and the smaller. Read by `jsd` only."""
    student_layers: tuple[int, ...] = ()
    """Layers of the teacher that the student is made of, from 0 on, e.g. [0,2,5], its embedding and norm with them
    (arXiv:1910.01108); empty = it has the shape of `student`, and starts from what that says."""
    student_every: int = 0
    """The same, of each so many layers the first: 2 takes 0, 2, 4, ...; 0 = as `student_layers` says."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    hidden: HiddenConfig = field(default_factory=HiddenConfig)
    relations: RelationsConfig = field(default_factory=RelationsConfig)
    teacher_sequences: int = 0
    """Texts that the teacher writes once, for the student to train on instead of the corpus (arXiv:1606.07947); with
    `alpha=0` it learns from nothing else. 0 = none."""
    on_policy_share: float = 0.0
    """Share of steps in which the student writes the text itself and learns what the teacher expects there, and nothing
    else (GKD's lambda, arXiv:2306.13649)."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """Layers of a teacher with so many that the student is made of; empty if it is not."""
        return tuple(range(0, num_layers, self.student_every)) if self.student_every else self.student_layers

    def __post_init__(self) -> None:
        require(
            self.student.family == Family.causal_lm,
            "distill.student.family",
            self.student.family,
            "is not what is distilled: students learn to predict the next token",
            "Set distill.student.family=causal_lm.",
        )
        require_positive("distill", self, ["temperature"])
        require_fraction("distill", self, ["alpha", "on_policy_share"])
        require(
            list(self.student_layers) == sorted({number for number in self.student_layers if number >= 0}),
            "distill.student_layers",
            list(self.student_layers),
            "must be numbers of layers from 0 on, each once, in rising order",
            "Set distill.student_layers=[0,2].",
        )
        require(
            self.student_every == 0 or (self.student_every >= 2 and not self.student_layers),
            "distill.student_every",
            self.student_every,
            f"must be 2 or more, and stand without distill.student_layers={list(self.student_layers)}",
            "Set distill.student_every=2 and distill.student_layers=[], or distill.student_every=0.",
        )
        require(
            self.teacher_sequences >= 0,
            "distill.teacher_sequences",
            self.teacher_sequences,
            "must not be negative",
            "Set it to 0 to train on the corpus.",
        )
        require(
            not (self.teacher_sequences and (self.cache.top_k or self.on_policy_share)),
            "distill.teacher_sequences",
            self.teacher_sequences,
            f"cannot be combined with distill.cache.top_k={self.cache.top_k} or "
            f"distill.on_policy_share={self.on_policy_share}: they are of the corpus's sequences",
            "Set distill.teacher_sequences=0, or both others to 0.",
        )
        require(
            0 < self.jsd_beta < 1,
            "distill.jsd_beta",
            self.jsd_beta,
            "must be above 0 and below 1, where nothing is left of the divergence",
            "Set distill.jsd_beta=0.5, or distill.divergence=forward_kl or reverse_kl for the limits.",
        )


class Objective(StrEnum):
    """Loss that a training run minimizes."""

    cross_entropy = "cross_entropy"
    distillation = "distillation"


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """All that a training stage depends on besides its data: what the ranks read from run.json."""

    objective: Objective
    model: ModelConfig
    train: TrainConfig
    engine: EngineConfig
    launcher: LauncherConfig
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=ELSEWHERE)
    sequence_length: int
    seed: int
    temperature: float = 1.0
    """Read by distillation only."""
    alpha: float = 1.0
    """Read by distillation only."""
    divergence: Divergence = Divergence.forward_kl
    """Read by distillation only."""
    jsd_beta: float = 0.5
    """Read by distillation only."""
    cache_top_k: int = 0
    """Tokens of the teacher's distributions that are read from its cache; 0 = the teacher itself is asked."""
    hidden: HiddenConfig = field(default_factory=HiddenConfig)
    relations: RelationsConfig = field(default_factory=RelationsConfig)
    on_policy_share: float = 0.0
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    student_layers: tuple[int, ...] = ()
    """Layers of the teacher that the weights come from; empty = from elsewhere."""
    document_masks: bool = False
    """Whether documents that share a sequence are told apart."""
    mixture: dict[str, int] = field(default_factory=dict)
    """Weight of each corpus by name; empty = there is one."""
    start: str | None = None
    """Candidate that the weights come from; null = `student_layers`, `model.initial_weights`, or drawn."""
    keep_zeros: bool = False
    """Whether weights that are zero at the start stay zero: those of a sparse candidate."""

    @property
    def model_section(self) -> str:
        """Where the user sets this run's model, for messages."""
        return self.start or ("distill.student" if self.objective == Objective.distillation else "model")

    @property
    def train_section(self) -> str:
        """Where the user sets this run's steps and batches, for messages."""
        return "distill.train" if self.objective == Objective.distillation else "train"

    @property
    def mimics_features(self) -> bool:
        """Whether more than the teacher's scores is learnt."""
        return self.hidden.weight > 0 or self.relations.weight > 0

    @property
    def runs_teacher(self) -> bool:
        """Whether ranks hold the teacher: it is neither cached nor without weight."""
        asked = (self.alpha > 0 and not self.cache_top_k) or self.mimics_features or self.on_policy_share > 0
        return self.objective == Objective.distillation and asked

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: those that see different sequences."""
        return self.launcher.world_size // self.engine.ranks_per_replica

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro steps per optimizer update on each rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.dp_size)

    def __post_init__(self) -> None:
        check_parallelism(self)
        check_distillation(self)
        per_micro_step = self.train.micro_batch_size * self.dp_size
        nearest = per_micro_step * max(1, round(self.train.global_batch_size / per_micro_step))
        section = self.train_section
        require(
            self.train.global_batch_size % per_micro_step == 0,
            f"{section}.global_batch_size",
            self.train.global_batch_size,
            f"must be a multiple of {section}.micro_batch_size={self.train.micro_batch_size} x "
            f"{self.dp_size} data-parallel ranks = {per_micro_step}",
            f"Set {section}.global_batch_size={nearest}.",
        )
        require(
            not (self.train.optimizer.name == Optimizer.muon and self.engine.zero_stage == 3),
            "train.optimizer.name",
            self.train.optimizer.name,
            "cannot be combined with engine.zero_stage=3, which cuts every matrix over ranks: Muon needs whole ones",
            "Set engine.zero_stage=2, or train/optimizer=adamw.",
        )
        require(
            not (
                self.model.kernels == Kernels.triton
                and self.train.optimizer.name == Optimizer.adamw
                and self.engine.offload_optimizer != Offload.none
            ),
            f"{self.model_section}.kernels",
            self.model.kernels,
            f"cannot be combined with engine.offload_optimizer={self.engine.offload_optimizer}: AdamW then updates "
            "weights in host memory, out of its kernel's reach",
            f"Set {self.model_section}.kernels=auto, or engine.offload_optimizer=none.",
        )
        require(
            not self.train.lora.enabled
            or self.model.initial_weights is not None
            or self.start is not None
            or bool(self.student_layers),
            "train.lora.rank",
            self.train.lora.rank,
            f"needs trained weights to adapt, and {self.model_section}.initial_weights is null",
            f"Set {self.model_section}.initial_weights to a Hugging Face directory, or train.lora.rank=0.",
        )
