# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""Launches that compile and run nothing, for GPUs that need not be here."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from kernels import dispatch
from kernels.binary import Compiled, read
from kernels.workloads import Trial, Workload


def compile_launches(launches: Iterable[Callable[[], Any]], architecture: int) -> list[Compiled]:
    """Each distinct kernel variant that is launched, compiled for an architecture such as 90 (sm_90).

    Raises:
        triton.CompilationError: A kernel does not compile.
    """
    found: dict[str, tuple[Any, Any]] = {}
    with _compiling(architecture, found):
        for launch in launches:
            launch()
    fresh = [mark for mark in found if mark not in _read]
    with ThreadPoolExecutor() as pool:  # the tools that read binaries are processes of their own
        _read.update(zip(fresh, pool.map(lambda mark: read(*found[mark], architecture), fresh), strict=True))
    return [_read[mark] for mark in found]


_read: dict[str, Compiled] = {}
"""By the hash that Triton gives a kernel."""


def launches(workload: Workload) -> Callable[[], None]:
    """Runs the operation and its backward pass once, on small CPU tensors."""

    def launch() -> None:
        trial = Trial(workload.kernel, workload.inputs(workload.small, workload.dtype, torch.device("cpu")))
        trial.forward()
        if workload.backward is not None:
            trial.backward()

    return launch


class _CompileOnlyDriver(DriverBase):  # type: ignore[misc]
    """Looks like one CUDA device to Triton's launcher."""

    def __init__(self, architecture: int) -> None:
        super().__init__()
        self.architecture = architecture

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here, so nothing can be timed")


@contextmanager
def _compiling(architecture: int, found: dict[str, tuple[Any, Any]]) -> Iterator[None]:
    launch, active = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, (self, kernel))
        return kernel

    triton.runtime.driver.set_active(_CompileOnlyDriver(architecture))
    JITFunction.run, dispatch.compile_only = compile_only, True
    try:
        yield
    finally:
        JITFunction.run, triton.runtime.driver._active, dispatch.compile_only = launch, active, False
