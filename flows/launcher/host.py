"""One host's ranks, started and reported over an ssh connection; see `flows.launcher.hostfile`.

Lines of JSON: it says a port that is free here, is told what to start, says each rank's exit code. When the connection
ends, or nothing comes through it for a while, the ranks end.
"""

from __future__ import annotations

import json
import os
import selectors
import sys
import time
from pathlib import Path
from typing import Any

from flows.config.launcher import LauncherConfig
from flows.launcher.local import LocalRanks, thread_environment
from flows.launcher.network import interface_of
from flows.launcher.sessions import free_port

SILENCE_S = 30.0
"""Longest time without a line, six times as long as they are apart: then the connection counts as cut."""
POLL_INTERVAL_S = 0.1


def main() -> int:
    """Serves one launch; the exit code of the connection's other end does not matter here."""
    _say({"free_port": free_port("")})
    lines = _Lines()
    order = lines.wait(SILENCE_S)
    if order is None:
        return 1
    ranks = _start(order)
    told: set[int] = set()
    heard_at = time.monotonic()
    try:
        while True:
            message = lines.wait(POLL_INTERVAL_S)
            if message is not None:
                heard_at = time.monotonic()
                if message.get("save"):
                    ranks.ask_to_save()
            if lines.ended or time.monotonic() - heard_at > SILENCE_S:
                return 1
            codes = ranks.exit_codes()
            for rank in codes.keys() - told:
                _say({"rank": rank, "exit_code": codes[rank]})
                told.add(rank)
    except BrokenPipeError:
        return 1
    finally:
        ranks.stop()


def _start(order: dict[str, Any]) -> LocalRanks:
    config = LauncherConfig(num_ranks=order["ranks"], threads_per_rank=order["threads_per_rank"])
    environment = {**order["environment"], "LOCAL_WORLD_SIZE": str(order["ranks"]), **thread_environment(config)}
    if "GLOO_SOCKET_IFNAME" not in environment and (connection := os.environ.get("SSH_CONNECTION")):
        environment["GLOO_SOCKET_IFNAME"] = interface_of(connection.split()[2])
    numbers = {order["first_rank"] + local_rank: local_rank for local_rank in range(order["ranks"])}
    return LocalRanks(order["command"], numbers, environment, Path(order["log_dir"]))


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


class _Lines:
    """JSON lines of standard input."""

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)

    def wait(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, or None if none comes in time or the input has ended."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest and not self.ended:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                return None
            chunk = os.read(0, 1 << 16)
            self.ended = not chunk
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line) if line else None


if __name__ == "__main__":
    sys.exit(main())
