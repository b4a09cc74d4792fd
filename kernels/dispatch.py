"""Which implementation of an operation runs: the Triton-language kernel or plain torch.

CUDA tensor: kernel. TRITON_INTERPRET=1 (set before Python starts): the kernel, interpreted, on tensors of any device;
slow, for tests. Else: `kernels.reference`. Deciding imports no Triton and touches no driver.
"""

import importlib.util
import os

from torch import Tensor, float16, float32
from torch import bfloat16 as bf16

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
compile_only = False
"""Set while launches compile and run nothing (`kernels.check`): kernels then take tensors of any device."""
WITH_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (float32, float16, bf16)
"""What kernels read and write; they compute in float32."""
MAX_COLUMNS = 8192
"""Longest row that a kernel holds in registers."""


class KernelError(RuntimeError):
    """A kernel was asked for where it cannot run."""


def unavailable_reason(kernels: str, device_type: str, columns: int = 1) -> str | None:
    """Why what `kernels` asks for cannot be; None if it can.

    Args:
        kernels: `auto`, `triton` or `reference`; only `triton` can be impossible.
        device_type: `torch.device.type` of the tensors, e.g. "cpu".
        columns: Width of their rows: a model's hidden size.
    """
    if kernels != "triton":
        return None
    if not WITH_TRITON:
        return "the package triton is not installed"
    if device_type != "cuda" and not INTERPRETED and not compile_only:
        return f"Triton-language kernels run on CUDA, not on {device_type}, unless TRITON_INTERPRET=1 interprets them"
    if columns > MAX_COLUMNS:
        return f"kernels hold rows of up to {MAX_COLUMNS} columns in registers, not {columns}"
    return None


def runs_kernel(kernels: str, x: Tensor, columns: int | None = None) -> bool:
    """Whether an operation on the rows of `x` runs its kernel.

    Args:
        kernels: `auto`: where one can run; `triton`: it must; `reference`: never.
        x: The tensor that the operation is about [..., D].
        columns: How many of a row its kernel holds in registers at once, where that is not all D.

    Raises:
        KernelError: `triton` is asked for and impossible.
    """
    if kernels == "reference":
        return False
    reason = unavailable_reason("triton", x.device.type, x.shape[-1] if columns is None else columns)
    if reason is None and x.dtype not in DTYPES:
        reason = f"kernels take float32, float16 and bfloat16, not {x.dtype}"
    if reason is not None and kernels == "triton":
        raise KernelError(f'kernels="triton" is not possible: {reason}. Use "auto" or "reference".')
    return reason is None
