"""What is counted on paper, against the model itself: parameters, FLOPs, tensors kept for the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flows.compose import CONF_DIR, compose_config
from flows.config.model import ModelConfig
from flows.model import arithmetic
from flows.model.decoder import Decoder, initialize

VOCAB_SIZE, BATCH, LENGTH = 96, 2, 24
SHAPE = ModelConfig(
    hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)
QWEN_2 = replace(SHAPE, qkv_bias=True, tie_word_embeddings=False)
QWEN_3 = replace(SHAPE, qk_norm=True, attention_head_dim=32)
MIXTRAL = replace(SHAPE, num_experts=4, num_experts_per_tok=2)
MODELS = sorted(CONF_DIR.glob("model/*.yaml"))


def test_there_are_models() -> None:
    assert len(MODELS) >= 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_model(path: Path, tied: bool) -> None:
    config = compose_config([f"model={path.stem}", f"model.tie_word_embeddings={str(tied).lower()}"]).model
    with torch.device("meta"):
        model = Decoder(config, 4096)
    assert arithmetic.parameter_count(config, 4096) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shape", [QWEN_2, QWEN_3, MIXTRAL, SHAPE], ids=["qwen2", "qwen3", "mixtral", "llama"])
def test_shapes_are_those_of_the_model(shape: ModelConfig) -> None:
    with torch.device("meta"):
        model = Decoder(shape, VOCAB_SIZE)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert arithmetic.weight_shapes(shape, VOCAB_SIZE) == shapes


@pytest.mark.parametrize("shape", [SHAPE, QWEN_3], ids=["llama", "qwen3"])
def test_flops_are_those_that_torch_counts(shape: ModelConfig) -> None:
    model = Decoder(shape, VOCAB_SIZE)
    ids = torch.randint(VOCAB_SIZE, (BATCH, LENGTH))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # torch does not count the fused kernel of CPUs
        model(ids).sum().backward()
    forward = arithmetic.forward_flops_per_token(shape, VOCAB_SIZE, LENGTH) * BATCH * LENGTH
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("shape", [SHAPE, QWEN_3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_torch_saves(dtype: torch.dtype, shape: ModelConfig) -> None:
    model = Decoder(shape, VOCAB_SIZE)
    initialize(model, 0)
    model = model.to(dtype)
    ids = torch.randint(VOCAB_SIZE, (BATCH, LENGTH))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(remember, lambda tensor: tensor):
        scores = model(ids)
        loss = F.cross_entropy(scores.float().flatten(0, 1), ids.flatten())
    saved_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    width = dtype.itemsize
    per_token = 3 * arithmetic.layer_activation_bytes(shape, width, False)
    per_token += arithmetic.norm_activation_bytes(shape, width, False)
    loss_per_token = 4 * VOCAB_SIZE  # the log-probabilities
    planned = BATCH * LENGTH * (per_token + loss_per_token)
    # Beside them: token ids and targets, two numbers of the loss, the cosines and sines of one sequence; in bfloat16,
    # which they are rounded to in each layer, three times.
    angles = 2 * LENGTH * shape.head_dim * width * (1 if dtype == torch.float32 else 3)
    beside = 8 * BATCH * LENGTH * 2 + angles + 64
    assert loss.isfinite()
    assert planned <= saved_bytes <= planned + beside
