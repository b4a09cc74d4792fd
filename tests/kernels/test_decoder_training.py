"""A tiny decoder trained with kernels and without: every parameter ends the same, and the kernels really ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flows.config.model import Kernels, ModelConfig
from flows.model import arithmetic
from flows.model.decoder import Decoder, initialize
from kernels.testing import assert_close_to_truth

LLAMA = ModelConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
QWEN_3 = replace(LLAMA, qk_norm=True, attention_head_dim=8)
MIXTRAL = replace(LLAMA, num_experts=2)
LAYERS = {"norm_fwd", "norm_bwd", "glu_fwd", "glu_bwd", "rotary_fwd", "rotary_bwd"}


class Ran(TorchDispatchMode):
    """Names of our operations that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "millrace":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def made(config: ModelConfig, kernels: Kernels, dtype: torch.dtype, device: str) -> Decoder:
    model = Decoder(replace(config, kernels=kernels, initializer_range=0.3), 50)
    initialize(model, 0)
    return model.to(device, dtype)


def trained(model: Decoder, step: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Parameters after two steps."""
    device = model.lm_head.weight.device
    tokens_BL = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        logits_BLV = (model if step is None else step)(tokens_BL[:, :-1])
        torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "config",
    [LLAMA, QWEN_3, pytest.param(MIXTRAL, marks=pytest.mark.exhaustive)],
    ids=["llama", "qwen3", "mixtral"],
)
def test_two_steps_with_kernels_and_without(config: ModelConfig, device: str) -> None:
    truth = trained(made(config, Kernels.reference, torch.float64, device))
    with Ran() as without:
        plain = trained(made(config, Kernels.reference, torch.float32, device))
    with Ran() as ran:
        actual = trained(made(config, Kernels.triton, torch.float32, device))
    assert not without.names
    assert ran.names >= (LAYERS if device == "cpu" else {name for name in LAYERS if name.endswith("fwd")})
    for name, parameter in actual.items():
        # a weight's gradient sums terms of all positions: its errors are of the tensor's scale, not of the element's
        assert_close_to_truth(parameter, plain[name], truth[name], truth[name].abs().max())


def test_layers_keep_what_is_planned(device: str) -> None:
    model = made(QWEN_3, Kernels.triton, torch.bfloat16, device)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens_BL = torch.arange(2 * 8, device=device).view(2, 8)
    with saved_tensors_hooks(remember, lambda tensor: tensor):
        scores_BLV = model(tokens_BL)
    assert scores_BLV.isfinite().all()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    planned = arithmetic.layer_activation_bytes(QWEN_3, 2, True) + arithmetic.norm_activation_bytes(QWEN_3, 2, True)
    angles = 2 * torch.float32.itemsize * 8 * QWEN_3.head_dim
    assert 0 <= kept - (2 * 8 * planned + tokens_BL.nbytes + angles) <= 64  # attention on CUDA keeps a few numbers


def test_recomputed_layers_give_the_same_bits(device: str) -> None:
    kept = trained(made(QWEN_3, Kernels.triton, torch.float32, device))
    model = made(QWEN_3, Kernels.triton, torch.float32, device)
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for name, parameter in trained(model).items():
        assert torch.equal(parameter, kept[name]), name


@pytest.mark.exhaustive
def test_compiled_steps_give_the_same_parameters(device: str) -> None:
    truth = trained(made(LLAMA, Kernels.reference, torch.float64, device))
    plain = trained(made(LLAMA, Kernels.reference, torch.float32, device))
    model = made(LLAMA, Kernels.triton, torch.float32, device)
    for name, parameter in trained(model, torch.compile(model, backend="aot_eager", fullgraph=True)).items():
        assert_close_to_truth(parameter, plain[name], truth[name], truth[name].abs().max())
