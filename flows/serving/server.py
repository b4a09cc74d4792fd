"""A real inference server on a model repository: started, watched, stopped, and nothing of it left behind."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flows.config.serving import TracingConfig
from flows.launcher import stop_sessions
from flows.serving.endpoint import ADMIN_HEADER, Endpoint
from flows.serving.hidden_argument import hide_argument
from flows.serving.installation import Installation, ServerError, prepare_installation
from flows.serving.ports import port_error

logger = logging.getLogger(__name__)

SHARED_MEMORY_DIR = Path("/dev/shm")
PREFIX = "millrace-server"
POLL_INTERVAL_S = 0.05
KILL_GRACE_S = 5
"""The server gets this long beyond `exit_timeout_s` between SIGTERM and SIGKILL."""
STACK_BYTES = 512 << 20
"""2.51 keeps a request's JSON body on the stack: with the usual 8 MB, a body of 5 MB ends the server."""
STARTS = 3
"""Times that a server is started which finds a port taken that had been free."""
CLOSED = "model-repository,shared-memory,trace,logging"
"""Groups of endpoints that only who started the server may use: they load code, read memory and write files."""
LAST_LINES = 12
LOG_LINE = r"(?m)^[IWEF]\d{4} "
"""Beginning of the server's own lines, the first of which comes after it has read its arguments."""
NOT_A_CAUSE = r"CudaDriverHelper|NVML"
"""What the server says at every start without a GPU."""
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class InferenceServer:
    """Serves the given models of a repository while the `with` block runs.

    What only its starter may ask needs a key, which the server takes on its command line alone. The key is overwritten
    there as soon as the server has read it; a local user who looks in the tenths of a second before that can see it.

    Args:
        repository: Model repository.
        models: Names of the models to load; later ones may call earlier ones.
        log_path: Where the server's own log goes.
        host: Address to bind.
        http_port: 0 = any free port, here and below.
        grpc_port: See `http_port`.
        metrics_port: See `http_port`.
        startup_timeout_s: Seconds until the models have to be ready.
        exit_timeout_s: Seconds given to requests in flight on the way out.
        tracing: Where traces go; None = nowhere.

    Raises:
        ConfigError: A port is taken.
        ServerError: No server is installed, or it did not come up; the message holds its last lines.
    """

    def __init__(
        self,
        repository: Path,
        models: Sequence[str],
        log_path: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        startup_timeout_s: float = 120,
        exit_timeout_s: int = 10,
        tracing: TracingConfig | None = None,
    ) -> None:
        self.repository = repository.absolute()
        self.models = list(models)
        self.log_path = log_path
        self.host = host
        self._wanted_ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
        self._ports = dict(self._wanted_ports)
        self._startup_timeout_s = startup_timeout_s
        self._exit_timeout_s = exit_timeout_s
        self._tracing = tracing or TracingConfig()
        self._process: subprocess.Popen[bytes] | None = None
        self._shared_memory_prefix = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(4)}-"
        self._runtime_dir: Path | None = None
        self._admin_key = secrets.token_hex(16)

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers, with the key to what is closed to others."""
        return Endpoint(self.http_address, self.grpc_address, self.metrics_address, self._admin_key)

    @property
    def http_address(self) -> str:
        """`host:port` of the HTTP endpoint."""
        return f"{self.host}:{self._ports['http_port']}"

    @property
    def grpc_address(self) -> str:
        """`host:port` of the gRPC endpoint."""
        return f"{self.host}:{self._ports['grpc_port']}"

    @property
    def metrics_address(self) -> str:
        """`host:port` of the Prometheus metrics."""
        return f"{self.host}:{self._ports['metrics_port']}"

    def __enter__(self) -> Self:
        _sweep_after_dead_owners()
        for starts_left in reversed(range(STARTS)):
            self._ports = _choose_ports(self.host, self._wanted_ports)
            self._runtime_dir = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-"))
            try:
                self._start(prepare_installation(self._runtime_dir))
                self._wait_until_ready()
                break
            except ServerError:
                self._stop()
                if not starts_left or not self._lost_a_port():
                    raise
            except BaseException:
                self._stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def check_running(self) -> None:
        """Raises `ServerError` with the server's last lines if its process has ended."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise ServerError(
                f"The inference server ended with exit code {code}. Its last lines, from {self.log_path}:\n"
                f"{_last_lines(self.log_path)}"
            )

    @property
    def pid(self) -> int:
        """Process id of the running server, which is that of its session, too."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Ends the server and its models' processes at once; requests in flight see their connections closed."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def load(self, model: str) -> None:
        """Loads what is new of a model; versions that are being served stay until the new ones are ready.

        Raises:
            ServerError: The server cannot load it; what was served before still is.
        """
        try:
            self._post(f"v2/repository/models/{model}/load")
        except urllib.error.HTTPError as error:
            reason = json.loads(error.read() or b"{}").get("error", str(error))
            raise ServerError(f"The inference server cannot load {model!r}: {reason}") from error

    def ready_versions(self, model: str) -> list[int]:
        """Versions of a model that answer requests, in rising order."""
        entries: list[dict[str, Any]] = json.loads(self._post("v2/repository/index"))
        ready = [entry for entry in entries if entry["name"] == model and entry.get("state") == "READY"]
        return sorted(int(entry["version"]) for entry in ready)

    def _post(self, path: str) -> bytes:
        headers = dict(self.endpoint.http_headers)
        request = urllib.request.Request(f"http://{self.http_address}/{path}", b"{}", headers, method="POST")
        with urllib.request.urlopen(request, timeout=self._startup_timeout_s) as response:
            body: bytes = response.read()
        return body

    def _start(self, installation: Installation) -> None:
        command = [
            str(installation.binary),
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",  # polling loads half-written versions, and twice
            *(f"--load-model={model}" for model in self.models),
            "--disable-auto-complete-config",
            f"--http-address={self.host}",
            f"--grpc-address={self.host}",
            f"--metrics-address={self.host}",
            f"--http-port={self._ports['http_port']}",
            f"--grpc-port={self._ports['grpc_port']}",
            f"--metrics-port={self._ports['metrics_port']}",
            f"--http-restricted-api={CLOSED}:{ADMIN_HEADER}={self._admin_key}",
            f"--grpc-restricted-protocol={CLOSED}:{ADMIN_HEADER}={self._admin_key}",
            f"--exit-timeout-secs={self._exit_timeout_s}",
            "--metrics-config=summary_latencies=true",  # quantiles, which an alert on the p95 needs
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory_prefix}",
            *_trace_arguments(self._tracing),
            *installation.arguments,
        ]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=dict(installation.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_in_server_process,
            )

    def _lost_a_port(self) -> bool:
        """Whether somebody else took a port between its choice and the server's start, and another may be chosen."""
        taken = re.findall(r"Socket '[^']*:(\d+)' already in use", self.log_path.read_text(errors="replace"))
        free_to_choose = {self._ports[name] for name, port in self._wanted_ports.items() if port == 0}
        return any(int(port) in free_to_choose for port in taken)

    def _wait_until_ready(self) -> None:
        # The metrics come up last, after the models are ready; a server that cannot bind their port then ends.
        waiting = [f"{self.http_address}/v2/health/ready", f"{self.metrics_address}/metrics"]
        deadline = time.monotonic() + self._startup_timeout_s
        key_is_shown = True
        while time.monotonic() < deadline:
            self.check_running()
            has_read_it = len(waiting) == 1 or re.search(LOG_LINE, self.log_path.read_text(errors="replace"))
            if key_is_shown and has_read_it:
                key_is_shown = False
                if not hide_argument(self.pid, self._admin_key):
                    logger.warning("The key to the server's closed endpoints stays on its command line: see `ps`.")
            try:
                with urllib.request.urlopen(f"http://{waiting[0]}", timeout=2) as response:
                    if response.status == 200:
                        waiting.pop(0)
                        if not waiting:
                            return
                        continue
            except OSError:
                pass
            time.sleep(POLL_INTERVAL_S)
        raise ServerError(
            f"The inference server was not ready after serve.startup_timeout_s={self._startup_timeout_s}. Raise it "
            f"if the models are large. Its last lines, from {self.log_path}:\n{_last_lines(self.log_path)}"
        )

    def _stop(self) -> None:
        if self._process is not None:
            # An open gRPC stream can hold it for ever; its models' processes share its session.
            stop_sessions([self._process], self._exit_timeout_s + KILL_GRACE_S)
        _unlink(SHARED_MEMORY_DIR.glob(f"{self._shared_memory_prefix}*"))
        if self._runtime_dir is not None:
            shutil.rmtree(self._runtime_dir, ignore_errors=True)


def die_with_parent() -> None:
    """Between fork and exec: the process ends with the thread that starts it, whatever ends that."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _trace_arguments(tracing: TracingConfig) -> list[str]:
    if tracing.url is None:
        return []
    settings = [
        "mode=opentelemetry",
        f"rate={tracing.one_in}",
        "level=TIMESTAMPS",
        f"opentelemetry,url={tracing.url}",
        "opentelemetry,resource=service.name=millrace",
    ]
    return [f"--trace-config={setting}" for setting in settings]


def _in_server_process() -> None:
    """Between fork and exec: the server ends with us and has room for large requests."""
    die_with_parent()
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    soft = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def _choose_ports(host: str, wanted: dict[str, int]) -> dict[str, int]:
    """Every port as wanted, or a free one for 0."""
    chosen, sockets = {}, []
    try:
        for name, port in wanted.items():
            listener = socket.socket()
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen()  # a bound port counts as taken only once somebody listens
            except OSError as error:
                raise port_error(name, port, host, error) from error
            chosen[name] = listener.getsockname()[1]
    finally:
        for listener in sockets:
            listener.close()
    return chosen


def _last_lines(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").strip().splitlines() if log_path.exists() else []
    told = [line for line in lines if re.match(r"[EF]\d{4} |error:|\w*(Error|Exception)\b", line)]
    told = [line for line in told if not re.search(NOT_A_CAUSE, line)]
    return "\n".join(f"  | {line}" for line in (told or lines)[-LAST_LINES:])


def _sweep_after_dead_owners() -> None:
    """Removes what servers of processes that were killed left in shared memory and the temporary directory."""
    for directory in (SHARED_MEMORY_DIR, Path(tempfile.gettempdir())):
        for path in directory.glob(f"{PREFIX}-*"):
            owner = re.match(rf"{PREFIX}-(\d+)-", path.name)
            if owner and not Path("/proc", owner[1]).exists():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else _unlink([path])


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
