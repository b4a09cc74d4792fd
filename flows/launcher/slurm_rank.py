"""One rank of a Slurm job: `python -m flows.launcher.slurm_rank <log_dir> <command>`, started by srun.

It tells the rank its numbers in the words that torch knows, and leaves in `log_dir` how the rank ended: srun has one
exit code for all of them, and Slurm forgets a job after some minutes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from flows.launcher.network import address_towards, interface_of
from flows.launcher.outcome import leave_exit_code
from flows.launcher.rank import EXIT_PREEMPTED

EXIT_FAILED = EXIT_PREEMPTED + 1
"""Of a rank that ended otherwise: srun returns the highest code, so that only ranks that all saved give the other."""


def main(log_dir: Path, command: list[str]) -> int:
    """Runs the command; 0, EXIT_PREEMPTED or EXIT_FAILED."""
    own = numbers(os.environ)
    print("$", *(f"{name}={value}" for name, value in own.items()), *command, flush=True)
    # Slurm signals every process of a job. The rank saves, and this one stays to say so.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: None)
    code = subprocess.Popen(command, env={**os.environ, **own, "PARENT_PID": str(os.getpid())}).wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun sends one more when the first rank has saved and ended
    leave_exit_code(log_dir, int(own["RANK"]), code)
    return code if code in (0, EXIT_PREEMPTED) else EXIT_FAILED


def numbers(environment: Mapping[str, str]) -> dict[str, str]:
    """A rank's own variables, from those that srun sets."""
    own = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
    }
    if int(environment["SLURM_NNODES"]) > 1 and "GLOO_SOCKET_IFNAME" not in environment:
        # else gloo takes what the host name resolves to, which is often this machine's loopback address
        address = address_towards(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
        own["GLOO_SOCKET_IFNAME"] = interface_of(address)
    return own


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
