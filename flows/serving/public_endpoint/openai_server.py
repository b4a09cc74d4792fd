"""Runs the public endpoint beside the inference server, in a thread of this process."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Self

import uvicorn

from flows.config import RunError
from flows.config.serving import ServeConfig
from flows.serving.ports import port_error
from flows.serving.public_endpoint.api_keys import read_keys
from flows.serving.public_endpoint.guard import BodyGuard, add_guarded_routes
from flows.serving.public_endpoint.openai_api import make_app

STARTUP_TIMEOUT_S = 30.0


class OpenAIServer:
    """While it is entered, the interface answers.

    Args:
        grpc_address: `host:port` of the inference server.
        repository: Its model repository.
        host: Address to bind.
        port: 0 = any free one.
        api_keys_path: File of keys; None = none is asked for.
        http_address: `host:port` of the inference server, for what of it is open to others; None = the interface alone.
        max_body_bytes: Longest body of a request.
        max_connections: More are answered with 503 at once.

    Raises:
        ConfigError: The port is taken, or the file of keys cannot be used.
    """

    def __init__(
        self,
        grpc_address: str,
        repository: Path,
        host: str,
        port: int,
        api_keys_path: Path | None,
        *,
        http_address: str | None = None,
        max_body_bytes: int = ServeConfig.max_body_bytes,
        max_connections: int = ServeConfig.max_connections,
    ) -> None:
        keys = read_keys(api_keys_path) if api_keys_path else []
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise port_error("openai_port", port, host, error) from error
        app = make_app(grpc_address, repository, keys)
        if http_address:
            add_guarded_routes(app, http_address)
        settings = uvicorn.Config(
            BodyGuard(app, max_body_bytes),
            log_level="warning",
            timeout_graceful_shutdown=5,
            limit_concurrency=max_connections,
            ws="none",
            server_header=False,
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    @property
    def address(self) -> str:
        """`host:port`."""
        host, port = self._socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        for _ in range(int(STARTUP_TIMEOUT_S / 0.05)):
            if self._server.started:
                return self
            self._thread.join(0.05)
        raise RunError(f"the OpenAI-compatible interface did not start within {STARTUP_TIMEOUT_S:g} s.")

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
