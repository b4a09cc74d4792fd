"""Kernel tests run twice: as they are, on CUDA, and interpreted in their own process (`test_in_interpreter.py`)."""

from collections.abc import Iterator

import pytest
import torch

from kernels.dispatch import INTERPRETED

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]

if INTERPRETED:
    from kernels.interpreter import mend_bfloat16

    mend_bfloat16()
    collect_ignore = [
        "test_check.py",
        "test_dispatch.py",
        "test_in_interpreter.py",
        "test_loss_rows.py",
        "test_reference.py",
    ]
else:
    collect_ignore = ["test_interpreter.py", "test_memory_guard.py"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where kernels run, with memory that betrays what they do not write and, interpreted, where they must not be."""
    from kernels.testing import strict_memory

    with strict_memory():
        yield request.param
