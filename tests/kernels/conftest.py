"""Kernel tests run twice: as they are, on CUDA, and interpreted in their own process (`test_in_interpreter.py`)."""

from kernels.dispatch import INTERPRETED

if INTERPRETED:
    from kernels.interpreter import mend_bfloat16

    mend_bfloat16()
    collect_ignore = ["test_check.py", "test_dispatch.py", "test_in_interpreter.py", "test_reference.py"]
else:
    collect_ignore = ["test_interpreter.py", "test_memory_guard.py"]
