"""Serves the models of a model repository with NVIDIA Triton Inference Server.

    python -m flows.serve                          on publish.model_repo, over HTTP, gRPC and Prometheus metrics
    python -m flows.serve serve.http_port=9000     on another port; 0 = any free one
    python -m flows.serve serve.openai_port=8080   with an interface like OpenAI's beside
    python -m flows.serve serve.replicas=2         two servers behind HAProxy, and one more for a canary

Versions that are published or promoted while it runs are loaded without a failed request; `python -m flows.promote`
says which is live. With replicas, a server that dies or hangs is replaced while the others answer. Ctrl-C lets requests
in flight end.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import ssl
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flows.config import Config, ConfigError
from flows.config.serving import LOOPBACK, ServeConfig
from flows.serving.installation import check_server_available
from flows.serving.ports import chosen_port
from flows.serving.public_endpoint.api_keys import read_keys
from flows.serving.releases.drift import DriftWatch
from flows.serving.releases.served_view import Pool, ServedView
from flows.serving.releases.watch import RepositoryWatcher, check_published
from flows.serving.repository import TEXT_SUFFIX, lock_repository
from flows.serving.server import PREFIX, InferenceServer

logger = logging.getLogger(__name__)

SERVER = "server"
"""What the only one is called, where there are no replicas."""


def serve(config: Config) -> None:
    """Runs the server until SIGINT or SIGTERM, and leaves nothing of it behind.

    Raises:
        ConfigError: The repository is empty, or a port is taken.
        ServerError: No server or proxy is installed, a model cannot be loaded, or the server ended.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the public endpoint's client tells of every request
    check_published(config.publish.model_repo)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not outlive the fork of another server
    check_public(config.serve)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as running:
        # Named like what a server leaves behind, so that the next one sweeps it up, too.
        scratch = tempfile.TemporaryDirectory(prefix=f"{PREFIX}-{os.getpid()}-")
        directory = Path(running.enter_context(scratch))
        serve_until = _serve_replicas if config.serve.replicas else _serve_alone
        serve_until(config, directory, stop, running)
        logger.info("Stopping; requests in flight have %s s to end.", config.serve.exit_timeout_s)


def check_public(options: ServeConfig) -> None:
    """Raises `ConfigError` over keys, certificate or ports that cannot be used, before models are loaded."""
    if options.api_keys_path is not None:
        read_keys(options.api_keys_path)
    if options.tls_certificate_path is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                options.tls_certificate_path, password=""
            )
        except OSError as error:  # ssl.SSLError too
            raise ConfigError(
                f"serve.tls_certificate_path={options.tls_certificate_path} cannot be used: {error.strerror or error}. "
                "Give a PEM file with the certificate and its key, unencrypted: cat cert.pem key.pem > both.pem."
            ) from error
    chosen_port("drift_port", options.drift_port, options.server_host)
    if options.openai_port is not None:
        chosen_port("openai_port", options.openai_port, options.host)


def _serve_alone(config: Config, directory: Path, stop: threading.Event, running: ExitStack) -> None:
    repository, options = config.publish.model_repo, config.serve
    check_server_available()
    view = ServedView(repository, directory / "view", Pool.live)
    with lock_repository(repository):  # nobody publishes while the versions to load are being chosen
        state = view.refresh()
        logger.info("Loading %s from %s", ", ".join(state), repository)
        server = running.enter_context(
            InferenceServer(
                view.path,
                list(state),
                config.artifacts_dir / f"serve-{options.http_port}.log",
                host=options.server_host,
                http_port=options.http_port,
                grpc_port=options.grpc_port,
                metrics_port=options.metrics_port,
                startup_timeout_s=options.startup_timeout_s,
                exit_timeout_s=options.exit_timeout_s,
                tracing=options.tracing,
            )
        )
    drift = running.enter_context(drift_watch(config, lambda: {SERVER: server.http_address}))
    found = f"HTTP http://{server.http_address}  gRPC {server.grpc_address}  metrics http://{server.metrics_address}"
    found += f"/metrics  drift http://{drift.address}/metrics  log {server.log_path}"
    logger.info("%s", ready_message(found, server, server.http_address))
    if options.openai_port is not None:
        from flows.serving.public_endpoint.openai_server import OpenAIServer  # imports a web framework

        interface = running.enter_context(
            OpenAIServer(
                server.grpc_address,
                repository,
                options.host,
                options.openai_port,
                options.api_keys_path,
                http_address=server.http_address,
                max_body_bytes=options.max_body_bytes,
                max_connections=options.max_connections,
            )
        )
        logger.info("OpenAI-compatible: base_url=http://%s/v1", interface.address)
    if options.host not in LOOPBACK:
        keys = "for a key" if options.openai_port is not None else "nobody for a key"
        logger.warning("Reachable from other machines on %s, which asks %s: %s", options.host, keys, exposed(options))
    watcher = RepositoryWatcher(server, repository, view, state)
    while not stop.wait(options.poll_interval_s):
        server.check_running()
        watcher.look()


def _serve_replicas(config: Config, directory: Path, stop: threading.Event, running: ExitStack) -> None:
    from flows.launcher import free_port
    from flows.serving.public_endpoint.openai_server import OpenAIServer  # imports a web framework
    from flows.serving.replicas.service import ReplicatedServer

    repository, options = config.publish.model_repo, config.serve
    keys = read_keys(options.api_keys_path) if options.api_keys_path else []
    inner = free_port() if options.openai_port is not None else None
    logger.info("Starting %s replicas on %s", options.replicas, repository)
    service = running.enter_context(
        ReplicatedServer(
            repository,
            options,
            config.artifacts_dir,
            directory,
            keys=keys,
            openai_server=None if inner is None else f"127.0.0.1:{inner}",
        )
    )
    scheme = "https" if options.tls_certificate_path else "http"
    found = f"HTTP {scheme}://{service.http_address}  gRPC {service.grpc_address}  metrics http://"
    drift = running.enter_context(drift_watch(config, service.addresses))
    found += f"{service.metrics_address}/metrics, /metrics/{service.replicas[0].name}  "
    found += f"drift http://{drift.address}/metrics  logs {config.artifacts_dir}"
    server = service.servers()[0]
    secrets: Sequence[str] = ["-H 'Authorization: Bearer KEY'"] if keys else []
    address = service.http_address
    logger.info("%s", ready_message(found, server, address, scheme, secrets))
    if inner is not None:
        # the proxy asks for the key
        running.enter_context(
            OpenAIServer(
                service.inner_grpc_address,
                repository,
                "127.0.0.1",
                inner,
                None,
                max_body_bytes=options.max_body_bytes,
                max_connections=options.max_connections,
            )
        )
        logger.info("OpenAI-compatible: base_url=%s://%s/v1", scheme, service.openai_address)
    while not stop.wait(options.poll_interval_s):
        service.look()


def drift_watch(config: Config, addresses: Callable[[], Mapping[str, str]]) -> DriftWatch:
    """What compares the servers' answers with the passports'."""
    options = config.serve
    host, port, interval_s = options.server_host, options.drift_port, options.drift_interval_s
    return DriftWatch(config.publish.model_repo, addresses, host, port, interval_s)


def exposed(options: ServeConfig) -> str:
    """What other machines can reach."""
    what = []
    if options.openai_port is not None:
        what.append("with a key, completions, chats and inference of every published model, without TLS")
    if options.accept_unguarded_ports:
        what.append("without a key, all that the server's own HTTP, gRPC and metrics ports answer, without TLS")
    return "; ".join(what)


def ready_message(
    found: str, server: InferenceServer, address: str, scheme: str = "http", words: Sequence[str] = ()
) -> str:
    """Where models are served, with requests to paste into a terminal.

    Args:
        found: Addresses, and where the logs are.
        server: A server, asked which versions it serves.
        address: `host:port` for HTTP.
        scheme: `http` or `https`.
        words: More words for curl.
    """
    lines = [f"Ready. {found}"]
    for model in server.models:
        command = _curl(f"{scheme}://{address}", model, words)
        lines += ["", f"{model}, versions {server.ready_versions(model)}:", f"  {command}"]
    return "\n".join([*lines, "", "Ctrl-C stops it."])


def _curl(url: str, model: str, words: Sequence[str]) -> str:
    if model.endswith(TEXT_SUFFIX):
        path = f"{model}/generate"
        body: dict[str, Any] = {"text_input": "def main(", "max_tokens": 16}
    else:
        tensors = [("input_ids", [1, 2, 3]), ("attention_mask", [1, 1, 1])]
        inputs = [{"name": name, "datatype": "INT64", "shape": [1, 3], "data": data} for name, data in tensors]
        path, body = f"{model}/infer", {"inputs": inputs}
    return " ".join(["curl -s", *words, f"{url}/v2/models/{path} -d '{json.dumps(body)}'"])


if __name__ == "__main__":
    from flows.compose import run_cli

    run_cli(serve, __doc__)
