"""What each operation computes, in plain torch: the truth for tests, the CPU path, the form that is exported."""

from kernels.reference.attention import document_attention, paged_decode_attention
from kernels.reference.layers import add_layer_norm, add_rms_norm, geglu, layer_norm, rms_norm, rotary, swiglu
from kernels.reference.losses import IGNORED, cached_distillation, cross_entropy, distillation
from kernels.reference.optimizer import adamw, gradient_squares
from kernels.reference.quantization import (
    FP8,
    INT8,
    LARGEST_CODE,
    SMALLEST_MAGNITUDE,
    dequantize,
    int8_product,
    quantize_groups,
    w4a16_linear,
    w8a8_linear,
)
from kernels.reference.sampling import sample_tokens

__all__ = [
    "FP8",
    "IGNORED",
    "INT8",
    "LARGEST_CODE",
    "SMALLEST_MAGNITUDE",
    "adamw",
    "add_layer_norm",
    "add_rms_norm",
    "cached_distillation",
    "cross_entropy",
    "dequantize",
    "distillation",
    "document_attention",
    "geglu",
    "gradient_squares",
    "int8_product",
    "layer_norm",
    "paged_decode_attention",
    "quantize_groups",
    "rms_norm",
    "rotary",
    "sample_tokens",
    "swiglu",
    "w4a16_linear",
    "w8a8_linear",
]
