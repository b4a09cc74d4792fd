"""AdamW over a flat shard of bf16 training, over many small tensors, and the gradient's norm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.adamw import adamw, gradient_squares
from kernels.workloads import Cost, Sizes, Workload

_CONSTANTS: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
Tensors = Sequence[Tensor]


def _gradients(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(sizes["elements"], generator=generator, device=device, dtype=dtype) for _ in range(sizes["tensors"])
    ]


def _update_inputs(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, copy: torch.dtype | None = None
) -> dict[str, Any]:
    gradients = _gradients(sizes, dtype, device)
    zeros = partial(torch.zeros_like, dtype=torch.float32)
    return {
        "weights": [gradient.float() for gradient in gradients],
        "gradients": gradients,
        "exp_avgs": [zeros(gradient) for gradient in gradients],
        "exp_avg_sqs": [zeros(gradient) for gradient in gradients],
        "steps": [torch.zeros((), device=device) for _ in gradients],
        "squares": gradient_squares(gradients),
        "copies": [zeros(gradient, dtype=copy) for gradient in gradients] if copy else [],
    }


def _kernel(weights: Tensors, gradients: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors,
            squares: Tensor, copies: Tensors) -> Tensors:  # fmt: skip
    adamw(
        weights, gradients, exp_avgs, exp_avg_sqs, steps, **_CONSTANTS, squares=squares, max_norm=1.0, copies=copies,
        kernels="triton",
    )  # fmt: skip
    return weights


def _plain(weights: Tensors, gradients: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors,
           squares: Tensor, copies: Tensors) -> Tensors:  # fmt: skip
    """As DeepSpeed's ZeRO does it: gradients to float32, clipped, torch's fused update, weights copied."""
    factor = (squares.sqrt() + 1e-6).clamp(min=1.0).to(weights[0].dtype)
    wide = [gradient.to(weight.dtype) for gradient, weight in zip(gradients, weights, strict=True)]
    torch._foreach_mul_(wide, 1 / factor)
    torch._foreach_add_(list(steps), 1)
    beta1, beta2 = _CONSTANTS["betas"]
    torch._fused_adamw_(
        list(weights), wide, list(exp_avgs), list(exp_avg_sqs), [], list(steps), lr=_CONSTANTS["learning_rate"],
        beta1=beta1, beta2=beta2, weight_decay=_CONSTANTS["weight_decay"], eps=_CONSTANTS["eps"], amsgrad=False,
        maximize=False,
    )  # fmt: skip
    if copies:
        torch._foreach_copy_(list(copies), list(weights))
    return weights


def _update(dtype: torch.dtype, copy: torch.dtype | None, tensors: int, elements: int) -> Workload:
    def cost(sizes: Sizes) -> Cost:
        narrow = dtype.itemsize + (copy.itemsize if copy else 0)
        return Cost(sizes["tensors"] * sizes["elements"] * (24 + narrow))

    return Workload(
        op="adamw",
        dtype=dtype,
        sizes={"tensors": tensors, "elements": elements},
        small={"tensors": 2, "elements": 20_000},
        inputs=partial(_update_inputs, copy=copy),
        kernel=_kernel,
        plain=_plain,
        forward=cost,
    )


def _norm(dtype: torch.dtype, tensors: int, elements: int) -> Workload:
    def inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {"gradients": _gradients(sizes, dtype, device)}

    def plain(gradients: Tensors) -> Tensor:
        """As DeepSpeed's ZeRO does it: in float64, tensor by tensor."""
        return torch.stack([torch.linalg.vector_norm(one.to(torch.float64)) for one in gradients]).square().sum()

    return Workload(
        op="gradient_squares",
        dtype=dtype,
        sizes={"tensors": tensors, "elements": elements},
        small={"tensors": 2, "elements": 20_000},
        inputs=inputs,
        kernel=partial(gradient_squares, kernels="triton"),
        plain=plain,
        forward=lambda sizes: Cost(sizes["tensors"] * sizes["elements"] * dtype.itemsize),
    )


_FLAT, _MANY = (1, 1_240_000_000), (300, 1_000_000)
WORKLOADS = [
    _update(torch.bfloat16, torch.bfloat16, *_FLAT),  # 28 bytes a parameter
    _update(torch.float32, None, *_FLAT),  # what ZeRO hands the optimizer
    _update(torch.float32, None, *_MANY),
    _norm(torch.bfloat16, *_FLAT),
    _norm(torch.float32, *_MANY),
]
