"""Training with weights as they will be stored: what is rounded while a model learns."""

from __future__ import annotations

from dataclasses import dataclass

from flows.config.checks import require

BITS = {"w4a16": 4, "w4a8": 4, "w8a16": 8, "w8a8": 8}
"""Of weights, by scheme."""
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class QuantizationAwareConfig:
    """Weights, and inputs where the scheme says so, are rounded in every forward pass; gradients pass as if they were
    not (straight-through, arXiv:1308.3432). What is saved are the weights before rounding: a `quantize` step with the
    same settings and `method=nearest` gives exactly the codes that were trained with.
    """

    scheme: str | None = None
    """`w4a16`, `w4a8`, `w8a16` or `w8a8`, as in `quantize.scheme`; null = nothing is rounded."""
    group_size: int = 32
    """Columns that share a scale in 4 bits, as in `quantize.group_size`."""
    symmetric: bool = True
    """In 4 bits: codes around zero, as in `quantize.symmetric`."""
    search: bool = True
    """In 4 bits: each group has the scale with the least squared error, as in `quantize.search`; some twenty more
    passes over the weights in each micro step."""

    @property
    def bits(self) -> int:
        """Of a weight."""
        return BITS[str(self.scheme)]

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of linear layers are rounded to INT8, too."""
        return self.scheme in ("w8a8", "w4a8")

    def __post_init__(self) -> None:
        require(
            self.scheme is None or self.scheme in BITS,
            "train.quantization_aware.scheme",
            self.scheme,
            f"must be null or one of {list(BITS)}",
            "Set train.quantization_aware.scheme=w4a16.",
        )
        require(
            self.group_size in GROUP_SIZES,
            "train.quantization_aware.group_size",
            self.group_size,
            f"must be one of {list(GROUP_SIZES)}, which our kernel multiplies",
            "Set train.quantization_aware.group_size=32.",
        )
