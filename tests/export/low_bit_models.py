"""Decoders in every low-bit form, their codes simply the nearest; how they are chosen well is not the matter here."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from flows.compression.candidate import replace_layer
from flows.compression.int8 import Int8Embedding
from flows.compression.quantized_linear import W4A8Linear, W4A16Linear, W8A8Linear, W8A16Linear, quantize_int4
from flows.compression.weight_only import Int4Embedding
from flows.config.model import ModelConfig
from flows.model.decoder import Decoder, initialize
from kernels.int4_layout import pack
from kernels.quantize import quantize_rows
from kernels.reference import FP8, INT8

FORMS = ("w8a8", "w8a8_static", "w8a16", "w4a16", "w4a16_asymmetric", "w4a8", "fp8", "fp8_static")
GROUP = 32
INPUT_LIMIT = 3.0
"""Largest activation that a static scale holds."""
VOCAB = 300
CONFIG = ModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    qkv_bias=True,
)


def linear(form: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer with the nearest codes of a weight [N, K]."""
    if form.startswith("w4"):
        kind = W4A8Linear if form == "w4a8" else W4A16Linear
        return kind(*int4(form, weight), bias, "reference")
    codes, scale = quantize_rows(weight, FP8 if form.startswith("fp8") else INT8)
    if form == "w8a16":
        return W8A16Linear(codes, scale[:, 0], bias, "reference")
    largest = 448.0 if form.startswith("fp8") else 127.0
    static = torch.tensor(INPUT_LIMIT / largest) if form.endswith("static") else None
    return W8A8Linear(codes, scale[:, 0], bias, "reference", static)


def int4(form: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words, scales and zero points of a weight, as the layers hold them."""
    codes, scales, zeros = quantize_int4(weight, GROUP, symmetric=form != "w4a16_asymmetric")
    return pack(codes), scales.t().contiguous(), None if zeros is None else zeros.t().contiguous()


def embedding(form: str, weight: Tensor) -> nn.Module:
    """An embedding of 4 bits beside layers of 4 bits, else of 8."""
    if form.startswith("w4"):
        return Int4Embedding(*int4(form, weight), weight.shape[1])
    codes, scale = quantize_rows(weight)
    return Int8Embedding(codes, scale[:, 0])


def low_bit_decoder(form: str, config: ModelConfig = CONFIG, tied: bool = True) -> Decoder:
    """A random decoder whose layers are all of one form; a tied head shares what the embedding holds."""
    model = Decoder(replace(config, tie_word_embeddings=tied), VOCAB)
    initialize(model, seed=0)
    model.requires_grad_(False).eval()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(2.0)  # sharper attention than at the start of training
            head = "w8a8" if name == "lm_head" and form.startswith("fp8") else form
            replace_layer(model, name, linear(head, layer.weight.data, layer.bias))
        elif isinstance(layer, nn.Embedding):
            replace_layer(model, name, embedding(form, layer.weight.data))
    if tied:
        for name, tensor in model.model.embed_tokens.named_buffers():
            setattr(model.lm_head, name, tensor)
    return model
