"""What hardware can do: a table from data sheets, and this machine, looked at without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flows.config import ConfigError
from flows.config.engine import Device, Precision
from flows.config.hardware import HardwareName

GB, GIB, TERA = 10**9, 2**30, 10**12
MATMUL_SIZE = 1024
COPY_BYTES = 64 * 2**20
"""More than a processor's caches hold."""
REPEATS = 20


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device: a GPU, or all cores of a machine together."""

    name: str
    bf16_flops: float
    """Peak FLOP/s of dense matrix products in bf16, summed in fp32."""
    fp32_flops: float
    """The same in fp32 proper, which is torch's default (no TF32)."""
    fp8_flops: float | None
    """The same in fp8; None if it cannot multiply in it."""
    memory_bytes: int
    """What ranks on it may use together."""
    bytes_per_s: float
    """Peak bandwidth of that memory."""
    typical_mfu: float
    """Share of the peak that training is assumed to reach."""
    is_gpu: bool = True
    measured: bool = False
    """The peak was measured here, not read from a data sheet."""

    def peak_flops(self, precision: Precision) -> float:
        """Peak FLOP/s in a number format.

        Raises:
            ConfigError: It is fp8, which this device does not have.
        """
        if precision == Precision.fp8:
            if self.fp8_flops is None:
                raise ConfigError(
                    f"engine.precision=fp8 cannot be planned for {self.name}, which does not multiply in it. "
                    "Set engine.precision=bf16, or plan.hardware=h100."
                )
            return self.fp8_flops
        return self.fp32_flops if precision == Precision.fp32 else self.bf16_flops


TABLE = {
    # NVIDIA H200 data sheet, SXM; half of its "with sparsity" numbers. MFU: Llama 3 reports 0.38-0.43 in bf16 on H100
    # (arXiv:2407.21783, table 4), at thousands of GPUs.
    HardwareName.h200: Hardware(
        name="NVIDIA H200",
        bf16_flops=989.4 * TERA,
        fp32_flops=66.9 * TERA,
        fp8_flops=1978.9 * TERA,
        memory_bytes=141 * GB,
        bytes_per_s=4.8 * TERA,
        typical_mfu=0.4,
    ),
    # NVIDIA H100 data sheet, SXM.
    HardwareName.h100: Hardware(
        name="NVIDIA H100 80GB HBM3",
        bf16_flops=989.4 * TERA,
        fp32_flops=66.9 * TERA,
        fp8_flops=1978.9 * TERA,
        memory_bytes=80 * GIB,
        bytes_per_s=3.35 * TERA,
        typical_mfu=0.4,
    ),
    # NVIDIA A100 data sheet, 80 GB SXM. MFU: 0.4-0.6 in LLM Foundry's tables; Megatron's 0.44-0.56 (arXiv:2104.04473).
    HardwareName.a100: Hardware(
        name="NVIDIA A100-SXM4-80GB",
        bf16_flops=312 * TERA,
        fp32_flops=19.5 * TERA,
        fp8_flops=None,
        memory_bytes=80 * GIB,
        bytes_per_s=2.04 * TERA,
        typical_mfu=0.45,
    ),
    # NVIDIA L4 data sheet; its "with sparsity" 242 halved. MFU: assumed, 300 GB/s leave little room.
    HardwareName.l4: Hardware(
        name="NVIDIA L4",
        bf16_flops=121 * TERA,
        fp32_flops=30.3 * TERA,
        fp8_flops=242.5 * TERA,
        memory_bytes=24 * GB,
        bytes_per_s=0.3 * TERA,
        typical_mfu=0.35,
    ),
    # NVIDIA Ada architecture white paper, table 2: bf16 and fp8 with fp32 sums. MFU: assumed.
    HardwareName.rtx4090: Hardware(
        name="NVIDIA GeForce RTX 4090",
        bf16_flops=165.2 * TERA,
        fp32_flops=82.6 * TERA,
        fp8_flops=330.3 * TERA,
        memory_bytes=24 * GIB,
        bytes_per_s=1.01 * TERA,
        typical_mfu=0.4,
    ),
}
"""Devices by the name of the setting; `name` is what the driver calls them."""
CPU_TYPICAL_MFU = 0.6
"""Of the peak that numpy's matrix product reaches: measured, the quickstart's base model on two quiet cores."""


def find_hardware(name: HardwareName, device: Device) -> Hardware:
    """The device that a plan is for.

    Args:
        name: The setting; `auto` looks at this machine.
        device: Where the ranks run; decides between this machine's GPUs and its processor.

    Raises:
        ConfigError: This machine's GPU is not in the table.
    """
    if name in TABLE:
        return TABLE[name]
    found = this_machine(Device.cpu if name == HardwareName.cpu else device)
    if found is None:
        raise ConfigError(
            f"plan.hardware=auto finds the GPU {_first_gpu_name()!r}, whose peak is not in the table. "
            f"Set plan.hardware to one of {', '.join(TABLE)}, or engine.device=cpu."
        )
    return found


def this_machine(device: Device) -> Hardware | None:
    """This machine's GPU, or its processor where there is none or none is wanted; None for a GPU not in the table.

    Args:
        device: Where the ranks run.
    """
    gpu = None if device == Device.cpu else _first_gpu_name()
    if gpu is None:
        return measure_processor()
    return next((one for one in TABLE.values() if one.name == gpu), None)


def _first_gpu_name() -> str | None:
    """What the driver calls this machine's first GPU; asked of nvidia-smi, because torch takes seconds to import."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return asked.stdout.splitlines()[0].strip() if asked.returncode == 0 and asked.stdout.strip() else None


def measure_processor() -> Hardware:
    """This machine's processor: all its cores' fp32 matrix product, and one core's copy, measured now in
    about 0.4 s; the memory it may use.

    bf16 is planned at the same peak, which is too little on processors with matrix units for it, and so is fp8, which
    is emulated.
    """
    generator = np.random.default_rng(0)
    left, right = (generator.random((MATMUL_SIZE, MATMUL_SIZE), dtype=np.float32) for _ in range(2))
    product = np.empty_like(left)
    flops = 2 * MATMUL_SIZE**3 / _fastest_s(lambda: np.matmul(left, right, out=product))
    source = np.ones(COPY_BYTES, dtype=np.uint8)
    target = np.empty_like(source)
    bytes_per_s = 2 * COPY_BYTES / _fastest_s(lambda: np.copyto(target, source))  # one read, one written
    cores = len(os.sched_getaffinity(0))
    return Hardware(
        name=f"this machine's {cores} cores",
        bf16_flops=flops,
        fp32_flops=flops,
        fp8_flops=flops,
        memory_bytes=usable_memory_bytes(),
        bytes_per_s=bytes_per_s,
        typical_mfu=CPU_TYPICAL_MFU,
        is_gpu=False,
        measured=True,
    )


def _fastest_s(work: Callable[[], object]) -> float:
    """Shortest of several times, so that what others do at the moment shows little."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def usable_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of this machine, or less where the container's limit is lower (cgroup 2, or 1)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        if path.exists() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)
