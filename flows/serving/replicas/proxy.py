"""HAProxy in front of the replicas: started, told which servers are ready, stopped."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from flows.config import ConfigError
from flows.launcher import stop_sessions
from flows.serving.installation import ServerError
from flows.serving.releases.served_view import Pool
from flows.serving.replicas.proxy_config import CANDIDATE, DRAWS, ProxySettings, backend_name, render
from flows.serving.server import InferenceServer, die_with_parent

STOP_GRACE_S = 2.0
ORDER_TIMEOUT_S = 30.0
OLDEST_VERSION = (2, 6)
"""`balance hash`, h2 to servers and retries of whole requests together."""


def check_proxy_available() -> str:
    """Path of the HAProxy that is installed.

    Raises:
        ServerError: There is none, or it is too old.
    """
    binary = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        raise ServerError(
            "serve.replicas needs HAProxy, which is not installed. On Debian and Ubuntu: apt-get install haproxy; "
            "or set serve.replicas=0 for one server without a proxy."
        )
    told = subprocess.run([binary, "-v"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", told)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_VERSION:
        raise ServerError(
            f"{binary} says {told.splitlines()[:1]}: serve.replicas needs HAProxy "
            f"{'.'.join(map(str, OLDEST_VERSION))} or later. Install a newer one, or set serve.replicas=0."
        )
    return binary


class Proxy:
    """Passes requests on while the `with` block runs. One thread at a time gives its orders.

    Args:
        settings: What its configuration is made of.
        log_path: Where its own log goes.
        keys: One of which requests must carry; empty = none is asked for.
    """

    def __init__(self, settings: ProxySettings, log_path: Path, keys: Sequence[str] = ()) -> None:
        self.settings = settings
        self._log_path = log_path
        self._keys = keys
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: dict[str, str] = {}
        """Standing orders by what they are about, given again to a proxy that had to be started again."""
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        directory = self.settings.directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        digests = [hashlib.sha256(f"Bearer {key}".encode()).hexdigest() for key in self._keys]
        self.settings.key_digests.write_text("".join(f"{digest}\n" for digest in digests))
        self.settings.shares.write_text(f"{CANDIDATE} 0\n")
        (directory / "haproxy.cfg").write_text(render(self.settings))
        self._binary = check_proxy_available()
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            stop_sessions([self._process], STOP_GRACE_S)

    def ensure_running(self) -> bool:
        """Starts the proxy again if it has ended, and gives it its orders; whether it had."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return False
            self._start()
            for order in self._orders.values():
                self._say(order)
            return True

    def finish_requests(self, within_s: float) -> None:
        """Takes no new connections and waits for the requests in flight."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)

    def switch_on(self, name: str, server: InferenceServer) -> None:
        """Sends requests to a replica's server from now on."""
        addresses = {"http": server.http_address, "grpc": server.grpc_address}
        for place in _places(name):
            protocol = place.split("/")[0].rpartition("_")[2]
            self._order(place, _ready(place, addresses[protocol]))
        self._order(f"metrics_{name}/{name}", _ready(f"metrics_{name}/{name}", server.metrics_address))

    def switch_off(self, name: str) -> None:
        """Sends no more requests to a replica's server; those in flight go on."""
        for place in (*_places(name), f"metrics_{name}/{name}"):
            self._order(place, f"set server {place} state maint")

    def set_share(self, share: float) -> None:
        """Sends that share of the requests to the candidate's server."""
        self._order("share", f"set map {self.settings.shares} {CANDIDATE} {round(share * DRAWS)}")

    def in_flight(self, name: str) -> int:
        """Requests that a replica's server has not answered yet."""
        rows = self._statistics()
        return sum(int(row["scur"]) for row in rows if row["svname"] == name and "metrics" not in row["# pxname"])

    def in_rotation(self) -> set[str]:
        """Names of the live version's servers that get requests."""
        rows = [row for row in self._statistics() if row["# pxname"] == backend_name(Pool.live, "http")]
        return {row["svname"] for row in rows if row["svname"] != "BACKEND" and row["status"].startswith("UP")}

    def answers(self, pool: Pool) -> tuple[int, int]:
        """HTTP requests that the pool answered so far, and how many of them with an error of the server's."""
        rows = [row for row in self._statistics() if row["# pxname"] == backend_name(pool, "http")]
        (total,) = [row for row in rows if row["svname"] == "BACKEND"]
        return int(total["req_tot"] or 0), int(total["hrsp_5xx"] or 0)

    def _statistics(self) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self._say("show stat"))))

    def _order(self, about: str, order: str) -> None:
        with self._lock:
            self._orders[about] = order
            answer = [
                line for line in self._say(order).splitlines() if line and "by 'stats socket command'" not in line
            ]
            if answer and not answer[0].startswith("no need to change"):  # it tells what it changed, too
                raise ServerError(f"HAProxy refuses {order!r}: {' '.join(answer)}")

    def _say(self, words: str) -> str:
        with self._lock, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ORDER_TIMEOUT_S)
            try:
                connection.connect(str(self.settings.admin_socket))
                connection.sendall(f"{words}\n".encode())
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            except OSError as error:
                raise ServerError(f"HAProxy does not answer: {error}. Its log: {self._log_path}") from error
        return answer.decode()

    def _start(self) -> None:
        path = self.settings.directory / "haproxy.cfg"
        check = subprocess.run([self._binary, "-c", "-f", str(path)], capture_output=True, text=True, check=False)
        if check.returncode:
            raise ServerError(f"HAProxy refuses the generated {path}:\n{check.stdout}{check.stderr}")
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self.settings.admin_socket.unlink(missing_ok=True)
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "-db", "-f", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        # It binds every address before it serves its admin socket's first answer.
        while True:
            if self._process.poll() is not None:
                raise ConfigError(f"HAProxy cannot start: {_last_alert(self._log_path)}")
            with suppress(ServerError):
                self._say("show info")
                return
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)


def _places(name: str) -> list[str]:
    """The lines of the configuration that are about one replica's server."""
    pools = [Pool.candidate] if name == CANDIDATE else list(Pool)
    return [f"{backend_name(pool, protocol)}/{name}" for pool in pools for protocol in ("http", "grpc")]


def _ready(place: str, address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"set server {place} addr {host} port {port}; set server {place} state ready"


def _last_alert(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()
    alerts = [line for line in lines if "[ALERT]" in line]
    return (alerts or lines or ["it said nothing"])[-1] + f". Its log: {log_path}"
