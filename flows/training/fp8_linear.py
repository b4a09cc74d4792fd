# Calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return,no-untyped-call"
"""Linear layers that multiply in fp8: e4m3 forward, e5m2 for gradients (arXiv:2209.05433), sums and results wider.

Each operand is scaled by its own largest element when it is used ("current scaling"), so that nothing is kept between
steps. Weights, their gradients and all else are as in bf16; evaluation computes in bf16 what is saved and served.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flows.config import RunError
from flows.model.decoder import Decoder

CAPABILITY = (8, 9)
"""Least compute capability of a GPU that multiplies in fp8."""
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-100
"""A tensor of zeros is scaled as if this were its largest element: the scale stays finite in float32."""


class UnfitHardwareError(RunError):
    """The GPU cannot multiply in fp8."""


def unavailable_reason(device: torch.device | str) -> str | None:
    """Why fp8 gains nothing on a device, naming it; None where it is multiplied in hardware."""
    if torch.device(device).type != "cuda":
        return f"{_NEEDED}, and this run is on the processor"
    return too_old(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def too_old(gpu: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU of a compute capability cannot multiply in fp8; None if it can."""
    return None if capability >= CAPABILITY else f"{_NEEDED}, and {gpu} has {capability[0]}.{capability[1]}"


_NEEDED = f"it needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or higher (Ada, Hopper, Blackwell)"


def multiply_in_fp8(model: Decoder, device: str) -> None:
    """Makes the linear layers of all blocks multiply in fp8; embedding and head stay as they are.

    Attention and what is outside of blocks keep their width, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3.1).
    Processors emulate the same arithmetic, slowly.

    Raises:
        UnfitHardwareError: The GPU cannot.
    """
    if device == "cuda" and (reason := unavailable_reason(device)):
        raise UnfitHardwareError(f"engine.precision=fp8 cannot run here: {reason}. Set engine.precision=bf16.")
    for layer in model.model.layers:
        for name, module in [*layer.named_modules()]:
            if type(module) is nn.Linear:
                layer.set_submodule(name, Fp8Linear(module))


class Fp8Linear(nn.Linear):
    """A linear layer that takes over another one's weights, under the same names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., out_features]."""
        if not self.training:
            return super().forward(input)
        product = _Product.apply(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """x [M, K] times the transpose of w [N, K]; all three numbers are multiples of 16."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        x8_MK, x_scale = to_fp8(x_MK, FORWARD)
        # The weight itself is kept, not its fp8 form: ZeRO-3 frees it meanwhile and brings it back.
        ctx.save_for_backward(x8_MK, x_scale, weight_NK)
        weight8_NK, weight_scale = to_fp8(weight_NK, FORWARD)
        return _multiply(x8_MK, weight8_NK, x_scale, weight_scale, x_MK.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient_MN,) = gradients
        x8_MK, x_scale, weight_NK = ctx.saved_tensors
        gradient8_MN, gradient_scale = to_fp8(gradient_MN, BACKWARD)
        for_x, for_weight = None, None
        if ctx.needs_input_grad[0]:
            weight8_NK, weight_scale = to_fp8(weight_NK, FORWARD)
            weight8_KN = weight8_NK.t().contiguous()
            for_x = _multiply(gradient8_MN, weight8_KN, gradient_scale, weight_scale, gradient_MN.dtype)
        if ctx.needs_input_grad[1]:
            gradient8_NM, x8_KM = gradient8_MN.t().contiguous(), x8_MK.t().contiguous()
            for_weight = _multiply(gradient8_NM, x8_KM, gradient_scale, x_scale, weight_NK.dtype)
        return for_x, for_weight


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` in fp8 and the scale [] to multiply it with, such that the largest element is the largest of the format."""
    scale = x.detach().abs().amax().float().clamp(min=SMALLEST) / torch.finfo(dtype).max
    return (x.detach().float() / scale).to(dtype), scale


def _multiply(
    left_MK: Tensor, right_NK: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """left times the transpose of right [M, N]; `fast` sums in fewer bits on Hopper, good enough forward only."""
    return torch._scaled_mm(
        left_MK, right_NK.t(), scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast
    )
