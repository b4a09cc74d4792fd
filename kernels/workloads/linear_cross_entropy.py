"""Cross-entropy from hidden states: a large vocabulary, and one with a soft-cap."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.workloads import Call, Cost, Sizes, Workload


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    tokens, vocab, width = sizes["tokens"], sizes["vocab"], sizes["width"]
    return {
        "x": torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True),
        "weight": torch.randn(vocab, width, device=device, dtype=dtype).mul_(width**-0.5).requires_grad_(),
        "targets": torch.randint(vocab, (tokens,), device=device),
    }


def _plain(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, reduction="sum")


def _rivals() -> dict[str, Call]:
    if find_spec("liger_kernel") is None:
        return {}
    fused = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return {"liger": lambda x, weight, targets: fused(weight, x, targets)}


def _workload(sizes: Sizes, small: Sizes, dtype: torch.dtype, softcap: float = 0.0) -> Workload:
    def nothing_yet(sizes: Sizes) -> Cost:
        return Cost(0)  # what the backward pass needs is computed on the way forward

    def all_of_it(sizes: Sizes) -> Cost:
        scores = sizes["tokens"] * sizes["vocab"]
        return Cost(3 * scores * dtype.itemsize, 6 * scores * sizes["width"])

    return Workload(
        op="linear_cross_entropy",
        dtype=dtype,
        sizes=sizes,
        small=small,
        inputs=_inputs,
        kernel=partial(linear_cross_entropy, softcap=softcap, kernels="triton"),
        plain=partial(_plain, softcap=softcap),
        forward=all_of_it,
        backward=nothing_yet,
        rivals={} if softcap else _rivals(),
    )


_SMALL = {"tokens": 4, "vocab": 4096, "width": 16}
WORKLOADS = [
    _workload({"tokens": 16384, "vocab": 248320, "width": 2048}, _SMALL, torch.bfloat16),
    _workload({"tokens": 8192, "vocab": 128256, "width": 4096}, _SMALL, torch.bfloat16, softcap=30.0),
]
