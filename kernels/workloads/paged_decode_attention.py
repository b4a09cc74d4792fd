"""Decoding over a paged cache: 64 sequences of 4096 tokens, and a single one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels import reference
from kernels.paged_decode_attention import paged_decode_attention
from kernels.workloads import Cost, Sizes, Workload

_PAGE = 16


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    sequences, pages = sizes["sequences"], sizes["tokens"] // _PAGE
    shape = (sequences * pages, _PAGE, sizes["key_heads"], sizes["width"])
    return {
        "q": torch.randn(sequences, sizes["heads"], sizes["width"], device=device, dtype=dtype),
        "k_pages": torch.randn(shape, device=device, dtype=dtype),
        "v_pages": torch.randn(shape, device=device, dtype=dtype),
        "page_table": torch.randperm(sequences * pages, device=device).int().view(sequences, pages),
        "lengths": torch.full((sequences,), sizes["tokens"], device=device, dtype=torch.int32),
    }


def _workload(sequences: int, width: int, dtype: torch.dtype) -> Workload:
    def forward(sizes: Sizes) -> Cost:
        rows = 2 * sizes["sequences"] * sizes["tokens"] * sizes["key_heads"]
        flops = 4 * sizes["sequences"] * sizes["tokens"] * sizes["heads"] * sizes["width"]
        return Cost(rows * sizes["width"] * dtype.itemsize, flops)

    heads = {"heads": 32, "key_heads": 8, "width": width}
    return Workload(
        op="paged_decode_attention",
        dtype=dtype,
        sizes={"sequences": sequences, "tokens": 4096, **heads},
        small={"sequences": 1, "tokens": 32, **heads},
        inputs=_inputs,
        kernel=partial(paged_decode_attention, kernels="triton"),
        plain=reference.paged_decode_attention,
        forward=forward,
    )


WORKLOADS = [
    _workload(64, 128, torch.bfloat16),
    _workload(1, 128, torch.bfloat16),
    _workload(64, 80, torch.bfloat16),
    _workload(64, 128, torch.float32),
]
