"""Serves the models of a model repository with NVIDIA Triton Inference Server.

    python -m flows.serve                          on publish.model_repo, over HTTP, gRPC and Prometheus metrics
    python -m flows.serve serve.http_port=9000     on another port; 0 = any free one
    python -m flows.serve serve.openai_port=8080   with an interface like OpenAI's beside

Versions that are published while it runs are loaded without a failed request. Ctrl-C lets requests in flight end.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from contextlib import ExitStack
from typing import Any

from flows.config import Config
from flows.config.serving import LOOPBACK, ServeConfig
from flows.serving.installation import check_server_available
from flows.serving.publish import lock_repository
from flows.serving.server import InferenceServer
from flows.serving.watch import RepositoryWatcher, find_models, repository_state

logger = logging.getLogger(__name__)


def serve(config: Config) -> None:
    """Runs the server until SIGINT or SIGTERM, and leaves nothing of it behind.

    Raises:
        ConfigError: The repository is empty, or a port is taken.
        ServerError: No server is installed, a model cannot be loaded, or the server ended.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    repository, options = config.publish.model_repo, config.serve
    find_models(repository)
    check_server_available()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as running:
        with lock_repository(repository):  # nobody publishes while the versions to load are being chosen
            state = repository_state(repository)
            logger.info("Loading %s from %s", ", ".join(state), repository)
            server = running.enter_context(
                InferenceServer(
                    repository,
                    list(state),
                    config.artifacts_dir / f"serve-{options.http_port}.log",
                    host=options.server_host,
                    http_port=options.http_port,
                    grpc_port=options.grpc_port,
                    metrics_port=options.metrics_port,
                    startup_timeout_s=options.startup_timeout_s,
                    exit_timeout_s=options.exit_timeout_s,
                )
            )
        logger.info("%s", ready_message(server))
        if options.openai_port is not None:
            from flows.serving.openai_server import OpenAIServer  # imports a web framework

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
            logger.warning(
                "Reachable from other machines on %s, which asks %s: %s", options.host, keys, exposed(options)
            )
        watcher = RepositoryWatcher(server, repository, state)
        while not stop.wait(options.poll_interval_s):
            server.check_running()
            watcher.look()
        logger.info("Stopping; requests in flight have %s s to end.", options.exit_timeout_s)


def exposed(options: ServeConfig) -> str:
    """What other machines can reach."""
    what = []
    if options.openai_port is not None:
        what.append("with a key, completions, chats and inference of every published model, without TLS")
    if options.accept_unguarded_ports:
        what.append("without a key, all that the server's own HTTP, gRPC and metrics ports answer, without TLS")
    return "; ".join(what)


def ready_message(server: InferenceServer) -> str:
    """Where the server answers, with requests to paste into a terminal."""
    lines = [
        f"Ready. HTTP http://{server.http_address}  gRPC {server.grpc_address}  "
        f"metrics http://{server.metrics_address}/metrics  log {server.log_path}",
    ]
    for model in server.models:
        lines += ["", f"{model}, versions {server.ready_versions(model)}:", f"  {_curl(server.http_address, model)}"]
    return "\n".join([*lines, "", "Ctrl-C stops it."])


def _curl(address: str, model: str) -> str:
    if model.endswith("_text"):
        path = f"{model}/generate"
        body: dict[str, Any] = {"text_input": "def main(", "max_tokens": 16}
    else:
        tensors = [("input_ids", [1, 2, 3]), ("attention_mask", [1, 1, 1])]
        inputs = [{"name": name, "datatype": "INT64", "shape": [1, 3], "data": data} for name, data in tensors]
        path, body = f"{model}/infer", {"inputs": inputs}
    return f"curl -s http://{address}/v2/models/{path} -d '{json.dumps(body)}'"


if __name__ == "__main__":
    from flows.compose import run_cli

    run_cli(serve, __doc__)
