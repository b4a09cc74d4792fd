"""In how many bits a model's matrices are stored and multiplied, and how the codes are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from flows.config.calibration import CalibratedConfig, CalibrationConfig
from flows.config.checks import require, require_fraction
from flows.config.model import ModelConfig

GROUP_SIZES = (32, 64, 128)
"""Columns that share a scale in 4 bits: what our kernel multiplies."""


class Scheme(StrEnum):
    """How a linear layer's weights are stored, and in what they meet its inputs."""

    w8a8 = "w8a8"
    w8a8_static = "w8a8_static"
    w8a16 = "w8a16"
    w4a16 = "w4a16"
    w4a8 = "w4a8"
    fp8 = "fp8"
    mixed = "mixed"


class Method(StrEnum):
    """What chooses the codes."""

    nearest = "nearest"
    gptq = "gptq"
    awq = "awq"
    smoothquant = "smoothquant"


IN_GROUPS = (Scheme.w4a16, Scheme.w4a8, Scheme.mixed)
"""Schemes that put matrices into 4 bits."""
LEAST_SQNR_DB = {
    **dict.fromkeys((Scheme.w8a8, Scheme.w8a8_static, Scheme.w8a16), 25.0),
    **dict.fromkeys((Scheme.w4a16, Scheme.w4a8), 10.0),
    Scheme.fp8: 20.0,
}
"""Of weights: far below what a bell curve keeps (40 dB in INT8, 20 in groups of 4 bits, 31 in E4M3)."""
SCHEMES_OF = {
    Method.nearest: tuple(Scheme),
    Method.gptq: (Scheme.w4a16, Scheme.w4a8, Scheme.w8a16, Scheme.w8a8, Scheme.w8a8_static, Scheme.mixed),
    Method.awq: (Scheme.w4a16, Scheme.w4a8, Scheme.w8a16),
    Method.smoothquant: (Scheme.w8a8, Scheme.w8a8_static),
}


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Matrices in few bits, really stored and multiplied as such."""

    scheme: Scheme = Scheme.w8a8
    """`w8a8`: INT8 weights with a scale per output channel, inputs to INT8 token by token, INT32 sums; `w8a8_static`:
    the inputs' scale is fixed beforehand, by calibration; `w8a16`: INT8 weights, floating-point inputs; `w4a16`: 4-bit
    weights, with a scale for each group of columns; `w4a8`: the same, inputs to INT8 group by group, which a CPU
    multiplies faster; `fp8`: as w8a8 in E4M3 (arXiv:2209.05433), embeddings and a tied head in INT8; `mixed`: for each
    layer w8a8, w4a16 or floating point, within a budget."""
    method: Method = Method.nearest
    """`nearest`: each weight by itself; `gptq`: later columns make up for what rounding did to earlier ones
    (arXiv:2210.17323); `awq`: columns that meet large inputs are scaled up first (arXiv:2306.00978), and `smoothquant`:
    columns that meet outliers, for their inputs to be scaled down (arXiv:2211.10438), both with the inverse folded into
    the norm or linear layer before. Embeddings and tied heads are always `nearest`."""
    group_size: int = 32
    """Columns that share a scale in 4 bits: 32, 64 or 128. 32 as in llama.cpp's Q4_0: small models have few columns."""
    symmetric: bool = True
    """In 4 bits: codes around zero; false = each group has a zero point, in 4 more bits, and uses all of its codes."""
    search: bool = True
    """In 4 bits: each group has the scale with the least squared error, not the one that spans its largest weight; with
    `awq` the error is that of what the group computes on calibration data, but for queries and keys."""
    act_order: bool = False
    """With `gptq`: columns with the largest inputs come first, while the others can still make up for them."""
    alpha: float = 0.5
    """With `smoothquant`: how much of the difficulty goes from inputs to weights; 0.5 is the paper's."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    sensitivity: bool = False
    """Whether to measure what quantizing each matrix alone does to the model's predictions; `mixed` always does."""
    max_bytes_ratio: float | None = None
    """With `mixed`: bytes of the model's tensors over those before; the budget is met at the least loss of quality."""
    max_kl: float | None = None
    """With `mixed`: Kullback-Leibler divergence in nats per token that each matrix alone causes on calibration data,
    summed over the matrices; as many bytes as possible are saved within it."""
    skip_modules: tuple[str, ...] = ()
    """Glob patterns of module names that stay in floating point, e.g. `*.down_proj`."""
    min_sqnr_db: float | None = None
    """A layer whose weights keep a lower signal-to-quantization-noise ratio stays in floating point and is reported;
    null = 25 dB in INT8, 20 in FP8, 10 in 4 bits."""

    @property
    def weight_bits(self) -> int:
        """Bits of a stored weight, which decide what the gates demand; `mixed` is held to those of 8 bits."""
        return 4 if self.scheme in (Scheme.w4a16, Scheme.w4a8) else 8

    def least_sqnr_db(self, scheme: Scheme) -> float:
        """What the weights of a layer must keep."""
        return LEAST_SQNR_DB[scheme] if self.min_sqnr_db is None else self.min_sqnr_db

    @property
    def needs_gram(self) -> bool:
        """Whether the method weighs errors by the products of inputs with each other."""
        return self.method in (Method.gptq, Method.awq)

    @property
    def needs_data(self) -> bool:
        """Whether anything is measured on calibration data."""
        by_scheme = self.scheme in (Scheme.w8a8_static, Scheme.mixed)
        return by_scheme or self.method != Method.nearest or self.sensitivity

    def __post_init__(self) -> None:
        self.calibration.check("quantize.calibration")
        able = SCHEMES_OF[self.method]
        require(
            self.scheme in able,
            "quantize.method",
            self.method,
            f"cannot be combined with quantize.scheme={self.scheme}: it is made for {', '.join(able)}",
            f"Set quantize.method=nearest, or quantize.scheme={able[0]}.",
        )
        require(
            self.group_size in GROUP_SIZES,
            "quantize.group_size",
            self.group_size,
            f"must be one of {list(GROUP_SIZES)}, which our kernel multiplies",
            "Set quantize.group_size=32.",
        )
        require(
            self.symmetric or self.scheme in IN_GROUPS,
            "quantize.symmetric",
            self.symmetric,
            f"is for 4 bits; in quantize.scheme={self.scheme} zero points would spoil integer products",
            "Set quantize.symmetric=true, or quantize.scheme=w4a16.",
        )
        require(
            not self.act_order or self.method == Method.gptq,
            "quantize.act_order",
            self.act_order,
            f"orders the columns of gptq, and quantize.method={self.method}",
            "Set quantize.act_order=false, or quantize.method=gptq.",
        )
        require_fraction("quantize", self, ["alpha"])
        budgets = {name: getattr(self, name) for name in ("max_bytes_ratio", "max_kl")}
        given = [name for name, value in budgets.items() if value is not None]
        if self.scheme == Scheme.mixed:
            require(
                len(given) == 1,
                "quantize.max_bytes_ratio",
                budgets["max_bytes_ratio"],
                f"and quantize.max_kl={self.max_kl} must be one budget for quantize.scheme=mixed, not {len(given)}",
                "Set one of them, e.g. quantize.max_bytes_ratio=0.2.",
            )
        else:
            require(
                not given,
                f"quantize.{given[0] if given else 'max_kl'}",
                budgets[given[0]] if given else None,
                f"is a budget for quantize.scheme=mixed, not {self.scheme}",
                "Set quantize.scheme=mixed, or leave it null.",
            )
        for name in given:
            value = budgets[name]
            require(
                value > 0,
                f"quantize.{name}",
                value,
                "must be greater than 0",
                f"Set quantize.{name}=0.2.",
            )


@dataclass(frozen=True, kw_only=True)
class QuantizingConfig(CalibratedConfig):
    """What a quantized candidate depends on, besides its source and the data."""

    quantize: QuantizeConfig

    @property
    def calibration(self) -> CalibrationConfig:
        """What inputs are measured on."""
        return self.quantize.calibration


def check_quantized_shape(shape: ModelConfig, config: QuantizeConfig, name: str) -> None:
    """Checks that a model can be quantized so, before it is made.

    Args:
        shape: Of the model.
        config: How it is quantized.
        name: The model's, for messages.

    Raises:
        ConfigError: Groups do not divide its matrices, or its inputs cannot be measured.
    """
    require(
        not (shape.num_experts and config.needs_data),
        "quantize.method",
        config.method,
        f"with quantize.scheme={config.scheme} measures inputs where every token passes through all of a layer, and "
        f"{name} has model.num_experts={shape.num_experts}",
        "Set quantize.method=nearest and quantize.scheme=w8a8, w8a16, w4a16 or fp8.",
    )
    if config.scheme not in IN_GROUPS:
        return
    widths = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    widths["num_attention_heads x head_dim"] = shape.num_attention_heads * shape.head_dim
    for what, columns in widths.items():
        fitting = [size for size in GROUP_SIZES if columns % size == 0]
        remedy = f"quantize.group_size={fitting[-1]}, or " if fitting else ""
        require(
            columns % config.group_size == 0,
            "quantize.group_size",
            config.group_size,
            f"must divide {what}={columns} of {name}",
            f"Set {remedy}a width that is a multiple of {config.group_size}.",
        )
