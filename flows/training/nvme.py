"""Whether this machine can keep weights and optimizer state on NVMe, and whether another run does so already."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

from flows.config import RunError

PROBE = """
import sys
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import AsyncIOBuilder
sys.exit(not (installed_ops.get(AsyncIOBuilder.NAME) or AsyncIOBuilder().is_compatible()))
"""
DEADLINE_S = 120.0


def unavailable_reason(directory: Path, device_type: str) -> str | None:
    """Why nothing can be kept in a directory, and what to do about it; None if it can.

    DeepSpeed's reading and writing is compiled when it is first used, in some minutes: asked here is only whether it
    is there already or could be. A process of its own finds out, because this one imports no DeepSpeed.

    Args:
        directory: Where the files would go.
        device_type: `cpu` or `cuda`, where ranks run.
    """
    if not (directory.is_dir() and os.access(directory, os.W_OK)):
        return f"{directory} is no directory that can be written to. Make it, or name another one"
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "DS_ACCELERATOR": device_type},
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    if done.returncode == 0:
        return None
    return (
        "DeepSpeed's asynchronous files need a C++ compiler and libaio with its headers, which are not here. Run "
        "apt-get install g++ ninja-build libaio-dev, or offload to cpu"
    )


def reserve(directory: Path, rank: int) -> IO[str]:
    """Keeps other runs from a rank's files, which DeepSpeed names by the rank alone, until it is closed.

    Raises:
        RunError: Another run has them.
    """
    lock = (directory / f".rank-{rank}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when this process ends, however it ends
    except BlockingIOError:
        lock.close()
        raise RunError(
            f"engine.nvme_path={directory} is in use by another run, whose files this one would overwrite. "
            "Name another directory, or wait for that run."
        ) from None
    return lock
