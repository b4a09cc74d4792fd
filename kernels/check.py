# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""Compiles every kernel launch for GPUs that need not be here: `python -m kernels.check`.

Each workload runs on small CPU tensors while launching is replaced by compiling, so that what is checked is what a GPU
would get: the same specialization, options and constants. Fails on spilled registers, on more
shared memory than the part has, and on anything that does not compile.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from kernels import dispatch
from kernels.dispatch import INTERPRETED
from kernels.workloads import Workload, all_workloads

SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What one block may use on each architecture that is checked (CUDA programming guide, compute capabilities)."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled as one launch asks for it."""

    kernel: str
    variant: str
    """Types and constants that tell it from other variants of the kernel."""
    architecture: int
    registers: int
    """Per thread."""
    spill_instructions: int
    """Loads and stores of local memory: registers that did not fit."""
    shared_bytes: int
    """Per block."""

    @property
    def fault(self) -> str | None:
        """What is wrong with it, if anything."""
        if self.spill_instructions:
            return f"spills registers ({self.spill_instructions} instructions)"
        if self.shared_bytes > SHARED_MEMORY_BYTES[self.architecture]:
            return f"needs more shared memory than {SHARED_MEMORY_BYTES[self.architecture]} bytes"
        return None


def launches(workload: Workload) -> Callable[[], None]:
    """Runs the operation and its backward pass once, on small uninitialized CPU tensors."""

    def launch() -> None:
        inputs = workload.inputs(workload.small, workload.dtype, torch.device("cpu"))
        results = workload.kernel(**inputs)
        if workload.backward is not None:
            wanted = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
            outputs = [result for result in ((results,) if isinstance(results, Tensor) else results)]
            torch.autograd.grad(outputs, wanted, [torch.empty_like(output) for output in outputs])

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
def _compiling(architecture: int, found: dict[str, Compiled]) -> Iterator[None]:
    launch, active = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in found:
            found[kernel.hash] = _inspect(self, kernel, architecture)
        return kernel

    triton.runtime.driver.set_active(_CompileOnlyDriver(architecture))
    JITFunction.run, dispatch.compile_only = compile_only, True
    try:
        yield
    finally:
        JITFunction.run, triton.runtime.driver._active, dispatch.compile_only = launch, active, False


def _inspect(function: Any, kernel: Any, architecture: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        listing = _output("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump reports no registers for {function.fn.__name__}:\n{usage}")
    names = {function.arg_names[index]: value for (index,), value in kernel.src.constants.items()}
    types = sorted({kind for kind in kernel.src.signature.values() if kind.startswith("*")})
    constants = [f"{name}={value}" for name, value in names.items()]
    return Compiled(
        kernel=f"{function.fn.__module__.rsplit('.', 1)[-1]}.{function.fn.__name__}",
        variant=" ".join([*types, *constants, f"warps={kernel.metadata.num_warps}"]),
        architecture=architecture,
        registers=int(registers[1]),
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        shared_bytes=kernel.metadata.shared,
    )


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def compile_launches(launches: Iterable[Callable[[], Any]], architecture: int) -> list[Compiled]:
    """Each distinct kernel variant that is launched, compiled for an architecture such as 90 (sm_90).

    Raises:
        triton.CompilationError: A kernel does not compile.
    """
    found: dict[str, Compiled] = {}
    with _compiling(architecture, found):
        for launch in launches:
            launch()
    return list(found.values())


def main(arguments: list[str] | None = None) -> int:
    """Prints what every launch compiles to; returns 1 if any of it is at fault."""
    workloads = all_workloads()
    ops = sorted({workload.op for workload in workloads})
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description="Compile every kernel without a GPU.")
    parser.add_argument("--op", choices=ops, nargs="*", default=ops, help="operations; default: all")
    parser.add_argument(
        "--architecture", type=int, choices=SHARED_MEMORY_BYTES, nargs="*", default=list(SHARED_MEMORY_BYTES)
    )
    chosen = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them. Unset it.")
    faults = 0
    print(f"triton {triton.__version__}\n{'kernel':28} {'sm':>3} {'registers':>9} {'spills':>6} {'shared':>6}  variant")
    for architecture in chosen.architecture:
        for op in chosen.op:
            for made in compile_launches([launches(each) for each in workloads if each.op == op], architecture):
                faults += made.fault is not None
                print(
                    f"{made.kernel:28} {made.architecture:3} {made.registers:9} {made.spill_instructions:6} "
                    f"{made.shared_bytes:6}  {made.variant}{f'  <-- {made.fault}' if made.fault else ''}"
                )
    print(f"{faults} at fault" if faults else "all sound")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
