"""The endpoint that others may reach: what passes is what the server itself answers, what is closed stays closed."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flows.config import ConfigError
from flows.config.serving import MAX_BODY_BYTES, ServeConfig
from flows.serve import exposed
from flows.serving.client import Client, Transport
from flows.serving.public_endpoint.openai_server import OpenAIServer
from flows.serving.server import InferenceServer
from tests.serving.tiny_chain import NAME, Published

pytestmark = pytest.mark.server
LIMIT = 20_000


@pytest.fixture(scope="module")
def address(published: Published, server: InferenceServer) -> Iterator[str]:
    with OpenAIServer(
        server.grpc_address,
        published.repository,
        "127.0.0.1",
        0,
        None,
        http_address=server.http_address,
        max_body_bytes=LIMIT,
    ) as running:
        yield running.address


def ask(address: str, path: str, body: bytes | None = b"{}", **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}", body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_inference_passes_unchanged(address: str, server: InferenceServer) -> None:
    ids = np.array([[1, 2, 3], [4, 5, 6]], np.int64)
    with Client(Transport.http, address) as outside, Client(Transport.http, server.http_address) as inside:
        for one in (outside, inside):
            assert one.is_ready(NAME, "1")
        scores = [one.scores(NAME, ids, np.ones_like(ids), "1") for one in (outside, inside)]
        np.testing.assert_array_equal(*scores)
        texts = [one.generate(f"{NAME}_text", "def") for one in (outside, inside)]
        assert texts[0] == texts[1]
        pieces = list(outside.stream(f"{NAME}_text", "def"))
        assert "".join(piece.text for piece in pieces) == texts[1].text
        assert len(pieces) > 1


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        f"/v2/repository/models/{NAME}/load",
        f"/v2/repository/models/{NAME}/unload",
        "/v2/systemsharedmemory/region/x/register",
        "/v2/trace/setting",
        "/v2/logging",
        f"/v2/models/{NAME}/trace/setting",
        f"/v2/models/..%2f{NAME}/infer",
        "/metrics",
        "/docs",
    ],
)
def test_what_is_closed_stays_closed(address: str, path: str) -> None:
    for body in (b"{}", None):
        assert ask(address, path, body)[0] == 404


def test_the_servers_own_ports_keep_management_closed(server: InferenceServer) -> None:
    for path in ("repository/index", f"repository/models/{NAME}/unload", "systemsharedmemory/status", "logging"):
        code, told = ask(server.http_address, f"/v2/{path}", None if "status" in path or "log" in path else b"{}")
        assert (code, "restricted" in told) == (403, True), path
    assert server.ready_versions(NAME) == [1]


def test_the_key_that_opens_management_is_not_on_the_command_line(server: InferenceServer) -> None:
    words = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    (shown,) = [word.rpartition("=")[2] for word in words if word.startswith("--http-restricted-api=")]
    assert set(shown) == {"*"}
    assert not any(server.endpoint.admin_key in word for word in words)


def test_long_compressed_and_broken_bodies_are_refused(address: str, server: InferenceServer) -> None:
    for path in (f"/v2/models/{NAME}_text/generate", "/v1/completions"):
        long = json.dumps({"text_input": "x" * LIMIT}).encode()
        assert ask(address, path, long)[0] == 413
        assert ask(address, path, b"{}", **{"Content-Encoding": "gzip"})[0] == 415
        code, told = ask(address, path, b'{"model": "tiny", "prompt": "\\ud800"}')
        assert (code, "lone surrogate" in told) == (400, True)
    too_many = {"model": NAME, "prompt": ["x"] * 100, "n": 2}
    told = ask(address, "/v1/completions", json.dumps(too_many).encode())[1]
    assert "prompts times n must lie between 1 and 128" in told
    code, told = ask(address, "/v1/completions", b'{"model": "tiny"}', **{"Content-Type": "text/plain"})
    assert (code, "Content-Type must be application/json" in told) == (415, True)
    server.check_running()


def test_a_server_that_is_gone_is_said(published: Published) -> None:
    with OpenAIServer("127.0.0.1:9", published.repository, "127.0.0.1", 0, None, http_address="127.0.0.1:9") as running:
        body = json.dumps({"model": NAME, "prompt": "def"}).encode()
        for path, one in ((f"/v2/models/{NAME}_text/generate", b'{"text_input": "x"}'), ("/v1/completions", body)):
            code, told = ask(running.address, path, one)
            assert (code, "does not answer" in told) == (503, True), told


def test_other_machines_reach_nothing_by_accident(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve.host=0.0.0.0 is reachable .* Set serve.openai_port=8080"):
        ServeConfig(host="0.0.0.0")
    guarded = ServeConfig(host="0.0.0.0", openai_port=8080, api_keys_path=tmp_path / "keys.txt")
    assert guarded.server_host == "127.0.0.1"
    assert "with a key" in exposed(guarded)
    assert "without a key" not in exposed(guarded)
    bare = ServeConfig(host="0.0.0.0", accept_unguarded_ports=True)
    assert (bare.server_host, "without a key" in exposed(bare)) == ("0.0.0.0", True)
    with pytest.raises(ConfigError, match=f"must not exceed {MAX_BODY_BYTES}: a longer JSON body ends"):
        ServeConfig(max_body_bytes=MAX_BODY_BYTES + 1)
