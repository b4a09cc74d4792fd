"""Traces reach a collector, and hold nothing of what users send."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.config import ConfigError
from flows.config.serving import TracingConfig
from flows.serving.client import Client, Transport
from flows.serving.server import InferenceServer
from tests.serving.tiny_chain import NAME, Chain

TEXT = f"{NAME}_text"
PROMPT = "def a_name_that_nobody_else_has("


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Where to send traces, and what came."""
    came: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.server
def test_every_second_request_is_traced_without_its_text(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.entry.path / "repo", tmp_path / "repo")
    with collector() as (url, came):
        tracing = TracingConfig(url=url, one_in=2)
        with (
            InferenceServer(tmp_path / "repo", [NAME, TEXT], tmp_path / "log", tracing=tracing) as server,
            Client(Transport.http, server.http_address) as client,
        ):
            for _ in range(6):
                client.generate(TEXT, PROMPT, options={"max_tokens": 2})
        # the server sends what is left when it ends
    groups = [group for body in came for group in json.loads(body)["resourceSpans"]]
    names = [span["name"] for group in groups for scope in group["scopeSpans"] for span in scope["spans"]]
    assert names.count("InferRequest") == 3
    assert b"millrace" in came[0]
    assert not any(b"nobody_else" in body for body in came)


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"serve.tracing.url=localhost must begin with http://"):
        TracingConfig(url="localhost")
