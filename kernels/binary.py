# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""What a compiled kernel needs and uses, read from its binary with the tools that Triton brings along."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Processor:
    """What blocks share on one streaming multiprocessor (CUDA programming guide, compute capabilities)."""

    block_shared_bytes: int
    """Most that one block may use."""
    shared_bytes: int
    threads: int
    registers: int = 64 * 1024
    blocks: int = 32
    tensor_memory_columns: int = 0


PROCESSORS = {
    80: Processor(block_shared_bytes=163 * 1024, shared_bytes=164 * 1024, threads=2048),
    90: Processor(block_shared_bytes=227 * 1024, shared_bytes=228 * 1024, threads=2048),
    100: Processor(block_shared_bytes=227 * 1024, shared_bytes=228 * 1024, threads=2048, tensor_memory_columns=512),
}
"""Of each architecture that is compiled for."""
REGISTERS_AT_ONCE = 8
"""Registers are given to threads in steps of this many."""
MATRIX_UNITS = {
    "HMMA": "HMMA",
    "IMMA": "IMMA",
    "QMMA": "QMMA",
    "HGMMA": "WGMMA",
    "IGMMA": "WGMMA-int8",
    "QGMMA": "WGMMA-fp8",
    "UTCHMMA": "tcgen05",
    "UTCIMMA": "tcgen05-int8",
    "UTCQMMA": "tcgen05-fp8",
}
"""Instructions of the tensor cores, and what they are called here."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled as one launch asks for it."""

    kernel: str
    variant: str
    """Types, constants and options that tell it from other variants of the kernel."""
    architecture: int
    registers: int
    """Per thread."""
    spill_instructions: int
    """Loads and stores of local memory: registers that did not fit."""
    shared_bytes: int
    """Per block."""
    matrix_units: tuple[str, ...]
    """Those of the tensor cores' instructions that it uses; empty: none."""
    blocks: int
    """That fit on one streaming multiprocessor."""

    @property
    def fault(self) -> str | None:
        """What is wrong with it whatever it was before, if anything."""
        if self.spill_instructions:
            return f"spills registers ({self.spill_instructions} instructions)"
        most = PROCESSORS[self.architecture].block_shared_bytes
        if self.shared_bytes > most:
            return f"needs more shared memory than {most} bytes"
        return (
            None if self.blocks else "fits on no multiprocessor: too many registers, threads or columns of its memory"
        )


def read(function: Any, kernel: Any, architecture: int) -> Compiled:
    """Needs of what Triton compiled from a jit function for one launch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        instructions = set(names := _INSTRUCTION.findall(_output("nvdisasm", "-c", file.name)))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump reports no registers for {function.fn.__name__}:\n{usage}")
    metadata = kernel.metadata
    return Compiled(
        kernel=f"{function.fn.__module__.rsplit('.', 1)[-1]}.{function.fn.__name__}",
        variant=_variant(function, kernel),
        architecture=architecture,
        registers=int(registers[1]),
        spill_instructions=names.count("LDL") + names.count("STL"),
        shared_bytes=metadata.shared,
        matrix_units=tuple(unit for name, unit in MATRIX_UNITS.items() if name in instructions),
        blocks=blocks(
            PROCESSORS[architecture],
            int(registers[1]),
            metadata.shared,
            32 * metadata.num_warps,
            getattr(metadata, "tmem_size", None) or 0,
        ),
    )


def blocks(
    processor: Processor, registers: int, shared_bytes: int, threads: int, tensor_memory_columns: int = 0
) -> int:
    """How many blocks fit on one streaming multiprocessor at a time.

    Args:
        processor: Of the architecture.
        registers: Per thread.
        shared_bytes: Per block, to which the system adds 1024.
        threads: Per block.
        tensor_memory_columns: Per block, where there is tensor memory.
    """
    given = -(-registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    limits = [processor.registers // (given * threads), processor.threads // threads, processor.blocks]
    limits.append(processor.shared_bytes // (shared_bytes + 1024))
    if tensor_memory_columns:
        limits.append(processor.tensor_memory_columns // tensor_memory_columns)
    return min(limits)


def _variant(function: Any, kernel: Any) -> str:
    source, names = kernel.src, function.arg_names
    kinds = list(source.signature.values())
    alike = [(kind[1:], len(list(group))) for kind, group in groupby(kind for kind in kinds if kind.startswith("*"))]
    pointers = ",".join(kind if count == 1 else f"{kind}x{count}" for kind, count in alike)
    constants = [f"{names[path[0]]}={getattr(value, '__name__', value)}" for path, value in source.constants.items()]
    odd = [names[index] for index in _not_divisible(function, source.signature, source.constants, source.attrs)]
    wide = [name for name, kind in zip(names, kinds, strict=True) if kind == "i64"]
    special = [f"{word}={','.join(found)}" for word, found in (("odd", odd), ("i64", wide)) if found]
    options = [f"warps={kernel.metadata.num_warps}", f"stages={kernel.metadata.num_stages}"]
    return " ".join([f"*{pointers}", *constants, *special, *options])


def _not_divisible(function: Any, signature: Mapping[str, str], constants: Any, attributes: Any) -> list[int]:
    """Arguments that Triton could not take to be multiples of 16."""
    return [
        index
        for index, (parameter, kind) in enumerate(zip(function.params, signature.values(), strict=True))
        if (kind.startswith("*") or kind in ("i32", "i64"))
        and not parameter.do_not_specialize
        and (index,) not in constants
        and ["tt.divisibility", 16] not in attributes.get((index,), [])
    ]


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
