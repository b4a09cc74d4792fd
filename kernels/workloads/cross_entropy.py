"""Cross-entropy on given scores: two vocabularies, one of them odd, the gradient over the scores."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy
from kernels.workloads import Cost, Sizes, Workload, liger


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    rows, columns = sizes["rows"], sizes["columns"]
    logits = torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True)
    return {"logits": logits, "targets": torch.randint(columns, (rows,), device=device)}


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, targets, reduction="sum")


def _workload(columns: int, dtype: torch.dtype, overwrite: bool) -> Workload:
    def passes(count: int, sizes: Sizes) -> Cost:
        return Cost(count * sizes["rows"] * sizes["columns"] * dtype.itemsize)

    return Workload(
        op="cross_entropy",
        dtype=dtype,
        sizes={"rows": 8192, "columns": columns},
        small={"rows": 4, "columns": 4096 + columns % 16},
        inputs=_inputs,
        kernel=partial(cross_entropy, overwrite=overwrite, kernels="triton"),
        plain=_plain,
        forward=partial(passes, 1),
        backward=partial(passes, 2),
        rivals=liger(
            lambda theirs: lambda logits, targets: theirs.liger_cross_entropy(logits, targets, reduction="sum")
        ),
    )


WORKLOADS = [
    _workload(128256, torch.bfloat16, overwrite=True),
    _workload(50257, torch.bfloat16, overwrite=False),
    _workload(128256, torch.float32, overwrite=True),
]
