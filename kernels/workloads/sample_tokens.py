"""Drawing tokens for 256 requests from a large vocabulary: cut off by both rules, and not cut off."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.sample_tokens import sample_tokens
from kernels.workloads import Cost, Sizes, Workload


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    requests = sizes["requests"]
    order = torch.arange(requests, device=device)
    return {
        "logits": 3 * torch.randn(requests, sizes["vocabulary"], device=device, dtype=dtype),
        "temperature": torch.full((requests,), 0.8, device=device),
        "top_k": torch.full((requests,), sizes["top_k"], device=device, dtype=torch.int32),
        "top_p": torch.full((requests,), sizes["top_p_percent"] / 100, device=device),
        "seed": order,
        "step": order,
    }


def _sorted(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """What servers write in plain torch: not the same draw, which has another source of chance."""
    scores, tokens = (logits / temperature[:, None]).sort(1, descending=True)
    place = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.masked_fill((place >= top_k[:, None]) & (top_k > 0)[:, None], -torch.inf)
    probabilities = scores.softmax(1, dtype=torch.promote_types(scores.dtype, torch.float32))
    before = probabilities.cumsum(1) - probabilities
    return tokens.gather(1, probabilities.where(before < top_p[:, None], 0).multinomial(1))[:, 0]


def _workload(top_k: int, top_p_percent: int, dtype: torch.dtype) -> Workload:
    def forward(sizes: Sizes) -> Cost:
        return Cost(sizes["requests"] * sizes["vocabulary"] * dtype.itemsize)

    cut = {"top_k": top_k, "top_p_percent": top_p_percent}
    return Workload(
        op="sample_tokens",
        dtype=dtype,
        sizes={"requests": 256, "vocabulary": 131072, **cut},
        small={"requests": 2, "vocabulary": 4096, **cut},
        inputs=_inputs,
        kernel=partial(sample_tokens, kernels="triton"),
        plain=partial(sample_tokens, kernels="reference"),
        forward=forward,
        rivals={"sorted": _sorted},
    )


WORKLOADS = [
    _workload(50, 90, torch.float32),
    _workload(0, 100, torch.float32),
    _workload(0, 90, torch.bfloat16),
]
