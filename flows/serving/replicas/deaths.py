"""Sees at once when an inference server, one of its models' processes, or a rank of a split model dies or is stopped.

The server never starts a dead model process again, goes on saying that it is ready, and answers the requests that the
process had with errors, after about a second; of one that does not run (SIGSTOP) it thinks the same. Who is told within
that time can end the server before it does so; then the connections close without an answer, and a proxy may repeat the
requests elsewhere.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

STUB = b"triton_python_backend_stub"
INSTANCE = 8
"""Place of the instance's name among a model process's arguments; its model file is the first."""
LOOK_MS = 200
"""How often it is looked whether a process is stopped."""
RANK = b".rank"
"""What the module ends with that a rank runs; its arguments begin with the version's directory, program and number."""
IS_RANK = "rank "
"""What a rank's name begins with; no instance's name holds a space."""


class DeathWatch:
    """Watches the processes that serve while the `with` block runs.

    Args:
        server_pid: The server, which leads a session that its models' processes share.
        tell: Called once, from another thread, with what died.
    """

    def __init__(self, server_pid: int, tell: Callable[[str], None]) -> None:
        self._server_pid = server_pid
        self._tell = tell
        self._wake = os.eventfd(0)
        self._watched: dict[int, tuple[int, tuple[str, str]]] = {}
        """Process id and what it serves, by pidfd."""
        self._lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        for handle in (*self._watched, self._wake):
            os.close(handle)

    def look(self) -> None:
        """Takes in the processes that are there; call it after models were loaded, and only if that succeeded."""
        with self._lock:
            if self._ended:
                return
            known = {pid for pid, _ in self._watched.values()}
            found = {self._server_pid: ("", "")} | model_processes(self._server_pid)
            for pid in found.keys() - known:
                with suppress(ProcessLookupError):
                    self._watched[os.pidfd_open(pid)] = (pid, found[pid])
            os.eventfd_write(self._wake, 1)

    def _watch(self) -> None:
        while not self._ended:
            poll = select.poll()
            with self._lock:
                for handle in (self._wake, *self._watched):
                    poll.register(handle, select.POLLIN)
            found = poll.poll(LOOK_MS)
            if not found and (stopped := self._find_stopped()):
                self._tell(stopped)
                return
            for handle, _ in found:
                if handle == self._wake:
                    os.eventfd_read(self._wake)
                elif died := self._judge(handle):
                    self._tell(died)
                    return

    def _find_stopped(self) -> str:
        """What is not served for want of a process that does not run; empty if all run."""
        with self._lock:
            mine = [(pid, instance) for pid, (_, instance) in self._watched.values() if pid != self._server_pid]
        for pid, instance in mine:
            with suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    return f"the process of {instance} is stopped"
        return ""

    def _judge(self, handle: int) -> str:
        """What is not served any more for want of the process that ended; empty if nothing is."""
        with self._lock:
            pid, (file, instance) = self._watched.pop(handle)
        os.close(handle)
        if pid == self._server_pid:
            return "the server has ended"
        # A version that the view has dropped, or whose process was replaced, has been unloaded on purpose.
        if not Path(file).exists() or (file, instance) in model_processes(self._server_pid).values():
            return ""
        return f"the process of {instance}, version {Path(file).parent.name}, has ended"


def model_processes(server_pid: int) -> dict[int, tuple[str, str]]:
    """Model file and instance by process id, for the processes of a server's models that are alive."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            words = stat.with_name("cmdline").read_bytes().split(b"\0")
            if int(session) != server_pid or state == "Z":
                continue
            if words[0].endswith(STUB):
                found[int(stat.parent.name)] = (words[1].decode(), words[INSTANCE].decode())
            elif words[2].endswith(RANK):
                directory, number = words[3].decode(), words[5].decode()
                model = Path(directory).parent.name
                # of the process that started it: other instances have ranks of the same number
                instance = f"{IS_RANK}{number} of {model} beside process {parent}"
                found[int(stat.parent.name)] = (f"{directory}/model.py", instance)
    return found
