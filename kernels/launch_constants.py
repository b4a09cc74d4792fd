# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""Which block sizes, warps and stages a launch uses: from a small table per operation, never tuned while training.

A table gives constants per architecture (compute capability x 10). A GPU takes those of the newest architecture in the
table that is not newer than itself, the oldest one's if there is none.
"""

from collections.abc import Mapping
from functools import cache
from typing import TypeVar

import torch
import triton

from kernels.dispatch import INTERPRETED

Constants = TypeVar("Constants")


def constants(table: Mapping[int, Constants], device: torch.device) -> Constants:
    """The entry of the table for the device; on a CPU, for the GPU that is compiled for, interpreted the oldest."""
    known = sorted(table)
    return table[max((each for each in known if each <= architecture(device)), default=known[0])]


def architecture(device: torch.device) -> int:
    """Compute capability x 10, such as 90 for Hopper; 0 in the interpreter."""
    if device.type == "cuda":
        return _capability(device.index or 0)
    return 0 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU; the interpreter runs programs one after the other: two do there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
