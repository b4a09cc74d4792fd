"""What a rank does towards whoever launched it: follows it, gives signs of life, saves when asked, says its errors."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: saved and stopped on request; the same command goes on."""
STACKS_AFTER = "MILLRACE_STALL_TIMEOUT_S"
"""Environment variable: seconds of silence after which a rank prints its stacks."""
REARM_S = 1.0
"""A silent rank prints its stacks between the stall timeout and this much later."""
PREEMPTION_NOTE = "preempted"
PR_SET_PDEATHSIG = 1
_asked_to_save = False


def follow_parent() -> None:
    """Ties this process's life to the one that launched it; called before anything else.

    The kernel sends SIGKILL when the launching process ends, even by SIGKILL. SIGUSR1 prints every thread's stack.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _print_stacks_unless_rearmed()
    parent = os.environ.get("PARENT_PID")
    if parent is None:  # run by hand, or by a cluster that ends what it started
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def save_on_sigterm() -> None:
    """From now on SIGTERM only raises a flag, for `asked_to_save`; called before the seconds of imports."""
    signal.signal(signal.SIGTERM, _raise_flag)
    # Python takes its handlers away while it ends: one more signal would make a killed rank of one that has saved.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)


def _raise_flag(number: int, frame: FrameType | None) -> None:
    global _asked_to_save
    _asked_to_save = True


def asked_to_save() -> bool:
    """Whether this rank has been sent SIGTERM; others may have been, too."""
    return _asked_to_save


class Heartbeat:
    """A rank's sign of life. When it stays away, the rank itself prints the stacks of all its threads."""

    def __init__(self, log_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._path = log_dir / f"rank-{environment.get('RANK', '0')}.heartbeat"
        self._armed_at = time.monotonic()

    def beat(self) -> None:
        """Says that work is going on."""
        self._path.touch()
        if time.monotonic() - self._armed_at >= REARM_S:
            self._armed_at = time.monotonic()
            _print_stacks_unless_rearmed()

    def rest(self) -> None:
        """Says that the work is over."""
        faulthandler.cancel_dump_traceback_later()


def _print_stacks_unless_rearmed() -> None:
    if timeout_s := float(os.environ.get(STACKS_AFTER, 0)):
        # A thread without the interpreter lock: it also speaks when a kernel or a collective never returns.
        faulthandler.dump_traceback_later(timeout_s + REARM_S, exit=False)


def speak_error(log_dir: Path, message: str) -> None:
    """Leaves a message for the user in place of this rank's last log lines."""
    (log_dir / f"rank-{os.environ.get('RANK', '0')}.error").write_text(message)


def note_preemption(log_dir: Path) -> None:
    """Leaves word that the ranks saved and stopped on request, where exit codes do not get through."""
    (log_dir / PREEMPTION_NOTE).touch()


def take_preemption_note(log_dir: Path) -> bool:
    """Whether `note_preemption` has been called since this was asked last."""
    note = log_dir / PREEMPTION_NOTE
    there = note.exists()
    note.unlink(missing_ok=True)
    return there
