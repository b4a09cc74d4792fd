"""One supervised inference server of several: started, asked whether it really infers, and replaced when it is sick."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from flows.config import ConfigError
from flows.config.serving import ServeConfig
from flows.serving.installation import ServerError
from flows.serving.probe import infer
from flows.serving.releases.served_view import ServedView
from flows.serving.replicas.deaths import DeathWatch
from flows.serving.replicas.proxy import Proxy
from flows.serving.replicas.proxy_config import LONGEST_ANSWER_S
from flows.serving.replicas.suspicion import Suspicion
from flows.serving.server import InferenceServer

logger = logging.getLogger(__name__)

RESTART_PAUSE_S = 1.0


class Replica:
    """Keeps one server on a view of the repository, in a thread of its own: the server ends with it.

    A sick server is killed at once, not stopped: the proxy repeats what it had in flight on another replica. One that
    may hang gets no new requests until it has answered, or is killed for that it has not.

    Args:
        name: Its name in the proxy's configuration.
        view: What it serves.
        options: Timeouts and intervals.
        log_path: Where the server's own log goes.
        proxy: Is told when the server may be sent requests.
    """

    def __init__(self, name: str, view: ServedView, options: ServeConfig, log_path: Path, proxy: Proxy) -> None:
        self.name = name
        self.restarts = 0
        """Times that a server which had served was replaced."""
        self.failure = ""
        """Why the last start failed; empty once one succeeded."""
        self.server: InferenceServer | None = None
        """The server while it serves."""
        self._view, self._options, self._log_path, self._proxy = view, options, log_path, proxy
        self._loaded: dict[str, str] = {}
        self._deaths: DeathWatch | None = None
        self._sickness = ""
        self._lets_finish = True
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins to start the server."""
        self._thread.start()

    @property
    def is_settled(self) -> bool:
        """Whether the first start has succeeded or failed."""
        return self._settled.is_set()

    def wait_until_settled(self) -> None:
        """Returns once the first start has succeeded or failed."""
        self._settled.wait()

    @property
    def has_ended(self) -> bool:
        """Whether it was stopped and nothing of it is left."""
        return self._stopping.is_set() and not self._thread.is_alive()

    def stop(self, *, let_finish: bool = True) -> None:
        """Ends its server; `join` waits for that.

        Args:
            let_finish: Whether the proxy runs on: it sends no more requests, and those in flight are waited for.
        """
        self._lets_finish = let_finish
        self._stopping.set()
        self._wake.set()

    def join(self) -> None:
        """Returns when its server has ended."""
        self._thread.join()

    def catch_up(self) -> None:
        """Loads what is new in the view; versions that are served stay until the new ones are ready."""
        server, deaths, state = self.server, self._deaths, self._view.state()
        if server is None or deaths is None or state == self._loaded:
            return  # a server that is starting finds the view as it is
        for model in [name for name in state if state[name] != self._loaded.get(name)]:
            self._loaded[model] = state[model]
            try:
                server.load(model)
                versions = server.ready_versions(model)
            except ServerError as error:
                logger.error("%s: %s What was served before still is.", self.name, error)
            except OSError:  # it is dying; its next start loads everything
                return
            else:
                deaths.look()
                logger.info("%s: %s: versions %s are served", self.name, model, versions)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._sickness = ""
            self._wake.clear()
            self._loaded = self._view.state()
            try:
                with InferenceServer(
                    self._view.path,
                    list(self._loaded),
                    self._log_path,
                    startup_timeout_s=self._options.startup_timeout_s,
                    exit_timeout_s=self._options.exit_timeout_s,
                    tracing=self._options.tracing,
                ) as server:
                    self._look_after(server)
            except (ServerError, ConfigError) as error:
                self.failure = str(error)
                logger.error("%s: %s", self.name, error)
                self._settled.set()
                self._stopping.wait(RESTART_PAUSE_S)
        self._settled.set()

    def _look_after(self, server: InferenceServer) -> None:
        def tell(died: str) -> None:
            server.kill()  # before it can answer with errors what the dead process had
            self._sickness = died
            self._wake.set()

        with DeathWatch(server.pid, tell) as self._deaths:
            self._sickness = self._probe(server)
            if not self._sickness and not self._stopping.is_set():
                self._proxy.switch_on(self.name, server)
                self.server, self.failure = server, ""
                self._settled.set()
            while not self._sickness and not self._stopping.is_set():
                self._wake.wait(self._options.probe_interval_s)
                self._sickness = self._sickness or self._probe(server)
            self.server = None
            if self._stopping.is_set():
                if self._lets_finish:
                    self._proxy.switch_off(self.name)
                    self._finish_requests()
                return
            server.kill()
            self._proxy.switch_off(self.name)
        self.restarts += 1
        logger.error("%s is started again: %s.", self.name, self._sickness)

    def _finish_requests(self) -> None:
        for _ in range(int(LONGEST_ANSWER_S / 0.1)):
            if self._sickness or not self._proxy.in_flight(self.name):
                return
            self._wake.clear()
            self._wake.wait(0.1)

    def _probe(self, server: InferenceServer) -> str:
        """What is wrong with a server that cannot infer; empty if it can."""
        for model in list(self._loaded):
            try:
                with Suspicion(self._proxy, self.name, server, model, self._options.probe_interval_s):
                    infer(server.http_address, model, self._options.probe_timeout_s)
            except (OSError, ValueError) as error:
                return f"{model} does not infer: {error}"
        return ""
