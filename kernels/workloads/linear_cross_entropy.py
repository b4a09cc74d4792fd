"""Cross-entropy from hidden states: a large vocabulary, and one with a soft-cap."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.workloads import Call, Cost, Sizes, Workload, liger


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


def _of_torch(x: Tensor, weight: Tensor, targets: Tensor, options: Any) -> Tensor:
    return F.linear_cross_entropy(x, weight, targets, reduction="sum", options=options)


def _rivals(softcap: float) -> dict[str, Call]:
    rivals = liger(
        lambda theirs: (
            lambda x, weight, targets: theirs.liger_fused_linear_cross_entropy(
                x, weight, targets, reduction="sum", softcap=softcap or None
            )
        )
    )
    if not softcap and hasattr(F, "linear_cross_entropy"):  # not in torch 2.11
        rivals["F.linear_cross_entropy"] = partial(_of_torch, options=torch.nn.LinearCrossEntropyOptions())
    return rivals


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
        rivals=_rivals(softcap),
    )


_SMALL = {"tokens": 4, "vocab": 4096, "width": 16}
WORKLOADS = [
    _workload({"tokens": 16384, "vocab": 248320, "width": 2048}, _SMALL, torch.bfloat16),
    _workload({"tokens": 8192, "vocab": 128256, "width": 4096}, _SMALL, torch.bfloat16, softcap=30.0),
]
