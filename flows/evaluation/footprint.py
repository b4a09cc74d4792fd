"""What a program takes besides time: memory and processor seconds, measured in a process of its own.

`python -m flows.evaluation.footprint PROGRAM_DIR '{"batch_size": 8, "tokens": 128, "requests": 25}'` prints it as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flows.artifact import PROJECT_ROOT
from flows.export.runtime import Program, ProgramError


@dataclass(frozen=True)
class Load:
    """What the program is asked."""

    batch_size: int
    tokens: int
    requests: int


@dataclass(frozen=True)
class Footprint:
    """What it took."""

    resident_bytes: int
    """By which the process grew from before the program was opened until a first request of one row was answered."""
    cpu_s_per_1000_tokens: float
    """Processor seconds of all threads, a stand-in for energy."""


def measure_footprint(program: Path, load: Load) -> Footprint:
    """The footprint of a program artifact, in a fresh process.

    Raises:
        ProgramError: The process failed; the message ends with its last line.
    """
    command = [sys.executable, "-m", "flows.evaluation.footprint", str(program.absolute()), json.dumps(asdict(load))]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ProgramError(f"{program} could not be measured in a process of its own: {last}")
    return Footprint(**json.loads(done.stdout))


def _measure(program: Path, load: Load) -> Footprint:
    ids = np.random.default_rng(0).integers(256, size=(load.batch_size, load.tokens), dtype=np.int64)
    mask = np.ones_like(ids)
    before = _resident_bytes()
    opened = Program(program)
    opened.next_token_scores(ids[:1], mask[:1])
    resident = _resident_bytes() - before
    opened.next_token_scores(ids, mask)
    started = time.process_time()
    for _ in range(load.requests):
        opened.next_token_scores(ids, mask)
    seconds = time.process_time() - started
    return Footprint(resident, round(1000 * seconds / (load.requests * ids.size), 6))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(Path(sys.argv[1]), Load(**json.loads(sys.argv[2]))))))
