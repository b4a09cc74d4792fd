"""Distillation from hidden states of both models: every divergence, and a teacher of whom 64 tokens were kept."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.linear_distillation import CachedTeacher, TeacherHead, linear_distillation
from kernels.workloads import Call, Cost, Sizes, Workload, liger

KEPT = 64


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, cached: bool) -> dict[str, Any]:
    tokens, vocab, width = sizes["tokens"], sizes["vocab"], sizes["width"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    given = {
        "x": normal(tokens, width).requires_grad_(),
        "weight": normal(vocab, width).mul_(width**-0.5).requires_grad_(),
        "targets": torch.randint(vocab, (tokens,), device=device),
    }
    if cached:  # a tenth of the mass is in the tail
        first = torch.randint(vocab - KEPT, (tokens, 1), device=device)
        indices = first + torch.arange(KEPT, device=device)
        log_probs = normal(tokens, KEPT).float().log_softmax(-1) + math.log(0.9)
        return given | {"teacher": (indices, log_probs, torch.full_like(log_probs[:, 0], math.log(0.1)))}
    return given | {"teacher": (normal(tokens, width), normal(vocab, width).mul_(width**-0.5))}


def _kernel(x: Tensor, weight: Tensor, targets: Tensor, teacher: tuple[Tensor, ...], **knobs: Any) -> Tensor:
    theirs = TeacherHead(*teacher) if len(teacher) == 2 else CachedTeacher(*teacher)
    return linear_distillation(x, weight, targets, theirs, kernels="triton", **knobs)


def _plain(x: Tensor, weight: Tensor, targets: Tensor, teacher: tuple[Tensor, ...], **knobs: Any) -> Tensor:
    logits = F.linear(x, weight)
    if len(teacher) == 2:
        return reference.distillation(logits, targets, F.linear(*teacher), **knobs).sum()
    indices, log_probs, tail_log_mass = teacher
    return reference.cached_distillation(logits, targets, indices, log_probs, tail_log_mass, **knobs).sum()


def _liger_jsd(theirs: Any) -> Call:
    """The same work; a mean, without the factor T^2."""
    loss = theirs.LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, temperature=2.0)
    return lambda x, weight, targets, teacher: loss(x, weight, *teacher, targets)


def _workload(sizes: Sizes, divergence: str, alpha: float, cached: bool = False) -> Workload:
    dtype = torch.bfloat16

    def nothing_yet(sizes: Sizes) -> Cost:
        return Cost(0)  # what the backward pass needs is computed on the way forward

    def all_of_it(sizes: Sizes) -> Cost:
        scores = sizes["tokens"] * sizes["vocab"]
        return Cost((3 if cached else 5) * scores * dtype.itemsize, (6 if cached else 8) * scores * sizes["width"])

    return Workload(
        op="linear_distillation",
        kind=f"{divergence} alpha={alpha:g}{' cached' if cached else ''}",
        dtype=dtype,
        sizes=sizes,
        small={"tokens": 4, "vocab": 4096, "width": 16},
        inputs=partial(_inputs, cached=cached),
        kernel=partial(_kernel, divergence=divergence, temperature=2.0, alpha=alpha),
        plain=partial(_plain, divergence=divergence, temperature=2.0, alpha=alpha),
        forward=all_of_it,
        backward=nothing_yet,
        rivals=liger(_liger_jsd, "liger_kernel.chunked_loss") if divergence == "jsd" else {},
    )


_SIZES = {"tokens": 8192, "vocab": 128256, "width": 4096}
WORKLOADS = [
    _workload(_SIZES, "forward_kl", alpha=1.0),
    _workload(_SIZES, "forward_kl", alpha=0.5),
    _workload(_SIZES, "reverse_kl", alpha=0.5),
    _workload(_SIZES, "jsd", alpha=0.5),
    _workload(_SIZES, "forward_kl", alpha=0.5, cached=True),
]
