"""Several inference servers behind one proxy, and a server of its own for the version under canary."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from flows.config.serving import ServeConfig
from flows.launcher import free_port
from flows.serving.installation import ServerError, check_server_available
from flows.serving.ports import chosen_port
from flows.serving.releases.canary import WHO, CanaryWatch
from flows.serving.releases.promotion import abort
from flows.serving.releases.served_view import Pool, ServedView
from flows.serving.releases.state import ReleaseError, read_aliases
from flows.serving.replicas.proxy import Proxy, check_proxy_available
from flows.serving.replicas.proxy_config import CANDIDATE, ProxySettings
from flows.serving.replicas.replica import Replica
from flows.serving.repository import lock_repository, published_names
from flows.serving.server import InferenceServer

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class _Canary:
    model_name: str
    version: int
    live: int
    share: float

    @property
    def what(self) -> tuple[str, int]:
        """What is served; another one needs another server."""
        return self.model_name, self.version


class ReplicatedServer:
    """Serves a repository with several servers behind HAProxy while the `with` block runs.

    Args:
        repository: Model repository.
        options: How many, where, and how patiently.
        directory: Where logs go.
        runtime_dir: Empty directory for links, sockets and the proxy's configuration.
        keys: One of which requests must carry; empty = none is asked for.
        openai_server: `host:port` of the interface like OpenAI's, to be offered at `options.openai_port`; None = none.

    Raises:
        ConfigError: A port is taken.
        ServerError: HAProxy or the inference server is missing, or no replica could be started.
    """

    def __init__(
        self,
        repository: Path,
        options: ServeConfig,
        directory: Path,
        runtime_dir: Path,
        *,
        keys: list[str] | None = None,
        openai_server: str | None = None,
    ) -> None:
        check_proxy_available()
        check_server_available()
        self._repository, self._options, self._directory = repository, options, directory
        self._views = {pool: ServedView(repository, runtime_dir / pool, pool) for pool in Pool}
        ports = {name: getattr(options, name) for name in ("http_port", "grpc_port", "metrics_port")}
        if openai_server is not None:
            ports["openai_port"] = options.openai_port or 0
        host = f"[{options.host}]" if ":" in options.host else options.host
        found = {name: f"{host}:{chosen_port(name, port, options.host)}" for name, port in ports.items()}
        self.http_address = found["http_port"]
        """`host:port` of the proxy's HTTP endpoint."""
        self.grpc_address = found["grpc_port"]
        """`host:port` of the proxy's gRPC endpoint."""
        self.metrics_address = found["metrics_port"]
        """`host:port` of the proxy's metrics; those of a replica are at /metrics/<its name>."""
        self.openai_address = found.get("openai_port")
        """`host:port` of the interface like OpenAI's."""
        names = [f"replica-{number}" for number in range(1, options.replicas + 1)]
        self.inner_grpc_address = f"{LOOPBACK}:{free_port()}"
        """`host:port` of a gRPC endpoint without TLS and keys, for our own interface."""
        settings = ProxySettings(
            directory=runtime_dir / "proxy",
            replicas=names,
            http_address=self.http_address,
            grpc_address=self.grpc_address,
            metrics_address=self.metrics_address,
            openai_address=self.openai_address,
            openai_server=openai_server,
            inner_grpc_address=self.inner_grpc_address,
            certificate=options.tls_certificate_path,
            has_keys=bool(keys),
        )
        self.proxy = Proxy(settings, directory / f"serve-{options.http_port}-proxy.log", keys or [])
        self.replicas = [self._replica(name, Pool.live) for name in names]
        """Those that serve the live version."""
        self.candidate: Replica | None = None
        """The one that serves the version under canary, if there is one."""
        self._asked: _Canary | None = None
        """What its server was started for, with the share that it has or gets once it serves."""
        self._watch: CanaryWatch | None = None
        self._leaving: list[Replica] = []
        self._running = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            with lock_repository(self._repository):
                self._views[Pool.live].refresh()
            starting.enter_context(self.proxy)
            starting.callback(self._stop_replicas)
            for replica in self.replicas:
                replica.start()
            for replica in self.replicas:
                replica.wait_until_settled()
            if not self.servers():
                raise ServerError(self.replicas[0].failure)
            self._running = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.proxy.finish_requests(self._options.exit_timeout_s)
        self._running.close()

    def servers(self) -> list[InferenceServer]:
        """The servers of the live version that serve at the moment."""
        return [replica.server for replica in self.replicas if replica.server is not None]

    def addresses(self) -> dict[str, str]:
        """`host:port` of their HTTP endpoints, by the replica's name."""
        servers = {replica.name: replica.server for replica in self.replicas}  # they come and go in other threads
        return {name: server.http_address for name, server in servers.items() if server is not None}

    def look(self) -> None:
        """Does what has been decided about versions meanwhile, and replaces a proxy that has ended."""
        if self.proxy.ensure_running():
            logger.error("HAProxy had ended and was started again.")
        with lock_repository(self._repository, wait=False) as locked:
            if locked:  # else somebody is publishing or promoting; the next look will find it done
                self._views[Pool.live].refresh()
                wanted = self._find_canary()
                if wanted is not None:
                    self._views[Pool.candidate].refresh()
            else:
                wanted = self._asked
        if self._asked is not None and (wanted is None or wanted.what != self._asked.what):
            self._end_canary()
        for replica in self.replicas:
            replica.catch_up()
        if wanted is not None and (wanted != self._asked or self._watch is None):
            self._follow(wanted)
        self._leaving = [replica for replica in self._leaving if not replica.has_ended]

    def _replica(self, name: str, pool: Pool) -> Replica:
        log_path = self._directory / f"serve-{self._options.http_port}-{name}.log"
        return Replica(name, self._views[pool], self._options, log_path, self.proxy)

    def _find_canary(self) -> _Canary | None:
        for name in published_names(self._repository):
            aliases = read_aliases(self._repository, name)
            if aliases.share and aliases.candidate is not None and aliases.live is not None:
                return _Canary(name, aliases.candidate, aliases.live, aliases.share)
        return None

    def _follow(self, wanted: _Canary) -> None:
        """Brings the candidate's server up, then gives it its share; without waiting for either."""
        if self.candidate is None:
            if self._leaving:  # of the canary before; its name in the proxy is still in use
                return
            self.candidate = self._replica(CANDIDATE, Pool.candidate)
            self.candidate.start()
        self._asked = wanted
        if not self.candidate.is_settled:
            return
        if self.candidate.server is None and self.candidate.failure:
            self._take_back(wanted, f"its server does not start: {self.candidate.failure}")
            return
        if self._watch is None:
            self._watch = CanaryWatch(
                self._repository,
                wanted.model_name,
                wanted.version,
                wanted.live,
                lambda: (self.candidate.server if self.candidate else None, self.servers()),
                self.proxy.answers,
                self._options.canary,
            )
            self._watch.start()
        self.proxy.set_share(wanted.share)
        logger.info("%s version %s answers %.3g %%", wanted.model_name, wanted.version, 100 * wanted.share)

    def _end_canary(self) -> None:
        self.proxy.set_share(0.0)
        if self._watch is not None:
            self._watch.stop()
        if self.candidate is not None:
            self.candidate.stop()
            self._leaving.append(self.candidate)
        if self._asked is not None:
            logger.info("%s version %s is under canary no more", *self._asked.what)
        self._watch = self.candidate = self._asked = None

    def _take_back(self, canary: _Canary, why: str) -> None:
        try:
            abort(self._repository, canary.model_name, why=why, who=WHO, version=canary.version)
        except ReleaseError:  # somebody was faster
            return
        finally:
            self._end_canary()
        logger.error("%s version %s is taken back: %s", canary.model_name, canary.version, why)

    def _stop_replicas(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        everyone = [*self.replicas, *([self.candidate] if self.candidate else []), *self._leaving]
        for replica in everyone:
            replica.stop(let_finish=False)
        for replica in everyone:
            replica.join()
