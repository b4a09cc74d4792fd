"""Trains many small runs in real ranks after one start: `python tests/training/rank_cases.py <directory>`.

Importing torch and DeepSpeed takes longer than a case: it is done once, and each rank of each case is a fork. Reads
cases.json ({name: TrainingJob}); each case leaves its logs, and an exit code per rank in exit_codes.json.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
warnings.filterwarnings("ignore", category=FutureWarning)

from flows.config import from_json  # noqa: E402
from flows.training.job import TrainingJob  # noqa: E402
from flows.training.loop import train  # noqa: E402

# Else every fork imports them, with its first optimizer, or when DeepSpeed looks at it and at the first batch.
for name in ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "transformers"):
    importlib.import_module(name)

CASE_DEADLINE_S = 120.0


def fork_rank(job: TrainingJob, rank: int, port: int) -> int:
    """Process id of a rank that trains."""
    pid = os.fork()
    if pid:
        return pid
    size = str(job.run.launcher.num_ranks)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_PORT=str(port)
    )
    code = 1
    with (job.log_dir / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        faulthandler.dump_traceback_later(CASE_DEADLINE_S - 5, file=log)
        try:
            train(job)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def run_case(job: TrainingJob) -> list[int]:
    """Exit codes of the case's ranks; -9 for those that did not end in time."""
    job.log_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = {fork_rank(job, rank, port): rank for rank in range(job.run.launcher.num_ranks)}
    codes = [0] * len(running)
    deadline = time.monotonic() + CASE_DEADLINE_S
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline or any(codes):
            for left in running:
                os.kill(left, signal.SIGKILL)
            deadline = time.monotonic() + CASE_DEADLINE_S
        else:
            time.sleep(0.005)
    return codes


def main(directory: Path) -> None:
    """Runs the cases one after another."""
    cases = json.loads((directory / "cases.json").read_text())
    chosen = sys.argv[2:]
    cases = {name: case for name, case in cases.items() if not chosen or any(words in name for words in chosen)}
    gc.freeze()  # what is imported is not garbage: no fork has to look through it
    codes = {}
    for name, case in cases.items():
        started = time.monotonic()
        codes[name] = run_case(from_json(TrainingJob, json.dumps(case)))
        print(f"{name}: {codes[name]} {time.monotonic() - started:.1f} s", flush=True)
        (directory / "exit_codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
