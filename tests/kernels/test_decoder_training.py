"""A tiny decoder with kernels and without: every parameter or score ends the same, and the kernels really ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flows.compression.candidate import replace_layer
from flows.compression.quantized_linear import W4A16Linear
from flows.config.model import Kernels, ModelConfig
from flows.model import arithmetic
from flows.model.decoder import Decoder, initialize
from flows.training.adamw import AdamW
from flows.training.objectives import Distillation, Loss, LossModule, cross_entropy
from kernels.adamw import gradient_squares
from kernels.testing import assert_close_to_truth

LLAMA = ModelConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
QWEN_3 = replace(LLAMA, qk_norm=True, attention_head_dim=8)
MIXTRAL = replace(LLAMA, num_experts=2)
BOTH_WAYS = ("norm", "glu", "rotary", "document_attention")
FORWARD = {f"{name}_fwd" for name in BOTH_WAYS} | {"gradient_squares", "adamw_"}
BACKWARD = {f"{name}_bwd" for name in BOTH_WAYS}
LOSSES = {"cross_entropy": "linear_cross_entropy_fwd", "distillation": "linear_distillation_fwd"}
VOCABULARY, CLIP = 50, 0.3


class Ran(TorchDispatchMode):
    """Names of our operations that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "millrace":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def made(config: ModelConfig, kernels: Kernels, dtype: torch.dtype, device: str, seed: int = 0) -> Decoder:
    model = Decoder(replace(config, kernels=kernels, initializer_range=0.3), VOCABULARY)
    initialize(model, seed)
    return model.to(device, dtype)


def trained(
    model: Decoder,
    objective: str = "cross_entropy",
    wrapped: Callable[[nn.Module], nn.Module] | None = None,
    steps: int = 2,
) -> dict[str, Tensor]:
    """Parameters after training on a row of three documents; each step's loss and norm, whose size clipping hides."""
    device, dtype, kernels = model.lm_head.weight.device, model.lm_head.weight.dtype, model.config.kernels
    loss: Loss = cross_entropy
    if objective == "distillation":
        loss = Distillation(made(LLAMA, kernels, dtype, str(device), seed=1), temperature=2.0, alpha=0.7)
    module: nn.Module = LossModule(model, loss)
    module = wrapped(module) if wrapped else module
    tokens_BL = torch.randint(0, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(0)).to(device)
    document_ids_BL = torch.tensor([[0, 0, 1, 2, 2, 2]], device=device)
    parameters = list(model.parameters())
    # with so large an eps an update depends smoothly on its gradient: no error is blown up
    optimizer = AdamW([{"params": parameters, "weight_decay": 0.1}], 0.1, (0.9, 0.95), 1e-2, kernels.value)
    optimizer.max_norm = CLIP
    measured: dict[str, Tensor] = {}
    for step in range(steps):
        mean = module(tokens_BL[:, :-1], tokens_BL[:, 1:], torch.tensor(6.0, device=device), document_ids_BL)
        mean.backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        optimizer.squares = gradient_squares(gradients, kernels.value)
        assert optimizer.squares > CLIP**2
        measured |= {f"loss {step}": mean.detach(), f"norm {step}": optimizer.squares.sqrt().to(dtype)}
        optimizer.step()
        optimizer.zero_grad()
    return measured | {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        pytest.param(LLAMA, "cross_entropy", id="llama"),
        pytest.param(QWEN_3, "distillation", id="qwen3"),
        pytest.param(MIXTRAL, "cross_entropy", id="mixtral", marks=pytest.mark.exhaustive),
    ],
)
def test_two_steps_with_kernels_and_without(config: ModelConfig, objective: str, device: str) -> None:
    truth = trained(made(config, Kernels.reference, torch.float64, device), objective)
    with Ran() as without:
        plain = trained(made(config, Kernels.reference, torch.float32, device), objective)
    with Ran() as ran:
        actual = trained(made(config, Kernels.triton, torch.float32, device), objective)
    losses = {"linear_cross_entropy_fwd", "linear_distillation_fwd"}
    assert without.names <= losses  # which compute with plain torch as well
    assert ran.names >= FORWARD | (BACKWARD if device == "cpu" else set())  # on CUDA, gradients have their own thread
    assert ran.names & losses == {LOSSES[objective]}
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
    kept = trained(made(QWEN_3, Kernels.triton, torch.float32, device), steps=1)
    model = made(QWEN_3, Kernels.triton, torch.float32, device)
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for name, parameter in trained(model, steps=1).items():
        assert torch.equal(parameter, kept[name]), name


@pytest.mark.exhaustive
def test_compiled_steps_give_the_same_parameters(device: str) -> None:
    truth = trained(made(LLAMA, Kernels.reference, torch.float64, device))
    plain = trained(made(LLAMA, Kernels.reference, torch.float32, device))
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    for name, parameter in trained(made(LLAMA, Kernels.triton, torch.float32, device), wrapped=compiled).items():
        assert_close_to_truth(parameter, plain[name], truth[name], truth[name].abs().max())


def test_scores_of_4_bit_layers_with_kernels_and_without(device: str) -> None:
    tokens_BL = torch.randint(0, VOCABULARY, (2, 3), generator=torch.Generator().manual_seed(0)).to(device)

    def scores(kernels: Kernels, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, set[str]]:
        model = made(replace(LLAMA, hidden_size=32, intermediate_size=64), kernels, torch.bfloat16, device)
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and name != "lm_head":
                replace_layer(model, name, W4A16Linear.of(linear.weight, linear.bias, 32, False, kernels.value))
        with Ran() as ran, torch.no_grad():
            return model.to(dtype)(tokens_BL), ran.names

    truth, _ = scores(Kernels.reference, torch.float64)  # of the same codes and scales
    plain, without = scores(Kernels.reference)
    actual, ran = scores(Kernels.triton)
    assert without == {"int4_weight_linear"}
    assert ran >= {"w4a16_linear", "norm_fwd", "glu_fwd", "rotary_fwd"}
    assert not ran & without
    assert_close_to_truth(actual, plain, truth, truth.abs().max())
