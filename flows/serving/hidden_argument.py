"""Takes a secret off the command line of a process that has read it, where `ps` and /proc/PID/cmdline show it to all.

For a program that takes its secret no other way: the inference server takes the key to its closed endpoints as an
option only, from no file, stream or variable of the environment. Restricted permissions do not help, the file is
readable by all; mounting /proc with hidepid=2 does, where one may.
"""

from __future__ import annotations

from pathlib import Path

ARGUMENTS_START, ARGUMENTS_END = 48 - 3, 49 - 3
"""Places in /proc/PID/stat, of what follows the program's name: fields 48 and 49 of proc(5), counted from 3."""
MASK = b"*"


def hide_argument(pid: int, secret: str) -> bool:
    """Overwrites the secret in the arguments of a process of ours, which must have copied it; whether that was allowed.

    Between the process's start and this call, who looks sees it.

    Args:
        pid: A child of this process.
        secret: What its arguments hold, any number of times.
    """
    process, wanted = Path(f"/proc/{pid}"), secret.encode()
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[ARGUMENTS_START]), int(fields[ARGUMENTS_END])
        with (process / "mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            masked = memory.read(end - start).replace(wanted, MASK * len(wanted))
            memory.seek(start)
            memory.write(masked)
        return wanted not in (process / "cmdline").read_bytes()
    except OSError:  # kernel.yama.ptrace_scope of 2 or more, or it has ended
        return False
