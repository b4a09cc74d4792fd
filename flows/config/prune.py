"""What is taken out of a model: whole parts, which leaves a smaller one, or single weights, which leaves zeros."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from flows.config.calibration import CalibratedConfig, CalibrationConfig
from flows.config.checks import require, require_positive
from flows.config.model import ModelConfig

TWO_OF_FOUR = "2:4"


class LayerImportance(StrEnum):
    """What tells which layers matter."""

    cosine = "cosine"
    loss = "loss"


class SparsityMethod(StrEnum):
    """What tells which single weights matter."""

    magnitude = "magnitude"
    magnitude_global = "magnitude_global"
    wanda = "wanda"


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What is left of the model, by measured importance: a smaller shape (arXiv:2407.14679), or `sparsity` zeros."""

    intermediate_size: int | None = None
    """Feed-forward neurons of each layer that are kept; null = all."""
    num_attention_heads: int | None = None
    """Query heads of each layer that are kept, as many of each group; null = all of the groups that are kept."""
    num_key_value_heads: int | None = None
    """Groups of each layer that are kept: key and value head with their query heads; null = all."""
    hidden_size: int | None = None
    """Channels of the residual stream that are kept, the same ones in all layers; null = all."""
    num_hidden_layers: int | None = None
    """Layers that are kept, the most important ones; null = all, or `layers`."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers to keep, from 0 on, e.g. [0,2]; empty = all, or the best `num_hidden_layers`."""
    layer_importance: LayerImportance = LayerImportance.cosine
    """`cosine`: one minus the cosine of a layer's input and output (arXiv:2403.03853); `loss`: how much the loss rises
    without it (arXiv:2407.14679, one more pass over the data for each layer)."""
    sparsity: float = 0.0
    """Share of the weights of attention and feed-forward layers that become zero; embeddings and norms stay."""
    method: SparsityMethod = SparsityMethod.magnitude
    """`magnitude`: the smallest of each matrix; `magnitude_global`: of all matrices together; `wanda`: the smallest
    products of a weight and its input's norm, in each row (arXiv:2306.11695)."""
    pattern: str | None = None
    """`2:4`: two of each four weights that follow each other in a row, for sparse tensor cores; null = any."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    @property
    def is_structured(self) -> bool:
        """Whether whole parts are taken out."""
        shape = (self.intermediate_size, self.num_attention_heads, self.num_key_value_heads)
        return any(value is not None for value in (*shape, self.hidden_size, self.num_hidden_layers)) or bool(
            self.layers
        )

    def __post_init__(self) -> None:
        self.calibration.check("prune.calibration")
        widths = ["intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers"]
        require_positive("prune", self, [name for name in widths if getattr(self, name) is not None])
        require(
            0 <= self.sparsity < 1,
            "prune.sparsity",
            self.sparsity,
            "must be 0 or more and below 1, where nothing is left",
            "Set prune.sparsity=0.5.",
        )
        require(
            self.pattern in (None, TWO_OF_FOUR),
            "prune.pattern",
            self.pattern,
            f"must be null or {TWO_OF_FOUR}, the one pattern that sparse tensor cores know",
            f'Set prune.pattern={TWO_OF_FOUR}; in a file "{TWO_OF_FOUR}", with quotes.',
        )
        require(
            self.pattern is None or self.sparsity == 0.5,
            "prune.sparsity",
            self.sparsity,
            f"must be 0.5 with prune.pattern={self.pattern}: two of four weights stay",
            "Set prune.sparsity=0.5.",
        )
        require(
            self.pattern is None or self.method != SparsityMethod.magnitude_global,
            "prune.method",
            self.method,
            f"compares weights of all layers, and prune.pattern={self.pattern} those of one group",
            "Set prune.method=wanda, or magnitude.",
        )
        require(
            not (self.is_structured and self.sparsity),
            "prune.sparsity",
            self.sparsity,
            "cannot be combined with a smaller shape in one step: importance would be that of the larger model",
            "Make two steps, e.g. steps={small: {prune: base}, sparse: {prune: small}}.",
        )
        require(
            self.num_hidden_layers is None or not self.layers,
            "prune.num_hidden_layers",
            self.num_hidden_layers,
            f"cannot be combined with prune.layers={list(self.layers)}, which says itself which layers stay",
            "Set prune.num_hidden_layers=null.",
        )
        require(
            list(self.layers) == sorted({number for number in self.layers if number >= 0}),
            "prune.layers",
            list(self.layers),
            "must be numbers of layers from 0 on, each once, in rising order",
            "Set prune.layers=[0,2].",
        )


@dataclass(frozen=True, kw_only=True)
class PruningConfig(CalibratedConfig):
    """What a pruned candidate depends on, besides its source and the data."""

    prune: PruneConfig

    @property
    def calibration(self) -> CalibrationConfig:
        """What importance is measured on."""
        return self.prune.calibration


def pruned_shape(source: ModelConfig, config: PruneConfig, name: str) -> ModelConfig:
    """The shape that is left of a model.

    Args:
        source: The model before.
        config: What is kept of it.
        name: The model's, for messages.

    Raises:
        ConfigError: More is asked for than there is, heads do not fill their groups, or nothing is taken out.
    """
    require(
        config.is_structured or config.sparsity > 0,
        "prune.sparsity",
        config.sparsity,
        f"and a shape without numbers leave {name} as it is",
        "Set prune.intermediate_size, prune.num_hidden_layers or another size, or prune.sparsity=0.5.",
    )
    require(
        source.num_experts == 0,
        "model.num_experts",
        source.num_experts,
        "cannot be pruned: importance is measured where every token passes through all of a layer",
        "Set model.num_experts=0, or leave the step out.",
    )
    for field_name in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_size"):
        kept, has = getattr(config, field_name), getattr(source, field_name)
        require(
            kept is None or kept <= has,
            f"prune.{field_name}",
            kept,
            f"must not exceed the {has} of {name}",
            f"Set prune.{field_name}={has // 2}, or null.",
        )
    groups = config.num_key_value_heads or source.num_key_value_heads
    per_group = source.num_attention_heads // source.num_key_value_heads
    heads = config.num_attention_heads or groups * per_group
    require(
        heads % groups == 0 and heads // groups <= per_group,
        "prune.num_attention_heads",
        heads,
        f"must be one of {[groups * count for count in range(1, per_group + 1)]}: {name} has {per_group} query heads "
        f"in each group, and {groups} groups stay",
        f"Set prune.num_attention_heads={groups * per_group}, or null.",
    )
    hidden = config.hidden_size or source.hidden_size
    return replace(
        source,
        hidden_size=hidden,
        intermediate_size=config.intermediate_size or source.intermediate_size,
        num_hidden_layers=_kept_layers(source, config, name),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        attention_head_dim=None if source.head_dim * heads == hidden else source.head_dim,
        initial_weights=None,
    )


def _kept_layers(source: ModelConfig, config: PruneConfig, name: str) -> int:
    has = source.num_hidden_layers
    require(
        not config.layers or config.layers[-1] < has,
        "prune.layers",
        list(config.layers),
        f"names a layer beyond the last of {name}, {has - 1}",
        f"Set prune.layers={list(range(0, has, 2))}.",
    )
    kept = len(config.layers) or config.num_hidden_layers or has
    require(
        kept <= has,
        "prune.num_hidden_layers",
        kept,
        f"must not exceed the {has} of {name}",
        f"Set prune.num_hidden_layers={max(1, has // 2)}.",
    )
    return kept
