"""HAProxy with the generated configuration, in front of small HTTP servers that say who they are."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows.launcher import free_port
from flows.serving.endpoint import ADMIN_HEADER
from flows.serving.installation import ServerError
from flows.serving.releases.served_view import Pool
from flows.serving.replicas import proxy as proxy_module
from flows.serving.replicas.proxy import Proxy, check_proxy_available
from flows.serving.replicas.proxy_config import BUFFER_BYTES, CANDIDATE, ProxySettings

needs_haproxy = pytest.mark.skipif(
    shutil.which("haproxy") is None and shutil.which("haproxy", path="/usr/sbin") is None,
    reason="the Debian package haproxy is not installed",
)
NAMES = ["replica-1", "replica-2", "replica-3"]
GENERATE = "/v2/models/m_text/generate"
INFER = "/v2/models/m/infer"
PATIENCE_S = 60


@dataclass
class Upstream:
    """As much of an inference server as a proxy is told: its addresses."""

    http_address: str
    grpc_address: str = "127.0.0.1:1"
    metrics_address: str = "127.0.0.1:1"


@contextmanager
def upstream(
    name: str,
    dies: threading.Event | None = None,
    answers: threading.Event | None = None,
    last_words: bytes = b"",
    port: int = 0,
) -> Iterator[Upstream]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if dies is not None and dies.is_set():
                self.close_connection = True  # it took the request and goes without an answer, or within one
                self.wfile.write(last_words)
                return
            if answers is not None:
                answers.wait(PATIENCE_S)
            body = json.dumps({"name": "opened" if ADMIN_HEADER in self.headers else name}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle(self) -> None:
            with suppress(ConnectionResetError):  # a proxy that ends leaves connections open
                super().handle()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Upstream(f"127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    thread.join()
    server.server_close()


def settings(directory: Path, *, has_keys: bool = False) -> ProxySettings:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(4)]
    return ProxySettings(directory, NAMES, *addresses[:3], None, None, addresses[3], None, has_keys)


def post(proxy: Proxy, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> str:
    url = f"http://{proxy.settings.http_address}{path}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers or {}, method="POST")
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.loads(response.read())["name"])


def refusal(proxy: Proxy, body: dict[str, Any]) -> tuple[int, str]:
    """Status and words of the error that is the answer."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(proxy, GENERATE, body)
    return raised.value.code, json.loads(raised.value.read())["error"]


def alone(proxy: Proxy) -> Proxy:
    """The proxy, once the request before has left it: what a busy replica gets beyond its share goes to another."""
    while any(proxy.in_flight(name) for name in NAMES):
        pass
    return proxy


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """Three replicas and a candidate, all ready."""
    with ExitStack() as running:
        started = running.enter_context(Proxy(settings(tmp_path / "proxy"), tmp_path / "proxy.log"))
        for name in (*NAMES, CANDIDATE):
            started.switch_on(name, running.enter_context(upstream(name)))  # type: ignore[arg-type]
        yield started


@needs_haproxy
def test_texts_of_the_same_beginning_find_the_same_replica(proxy: Proxy) -> None:
    system = "You are the helper of a shop that sells tea. " * 8
    found = {post(alone(proxy), GENERATE, {"text_input": system + end}) for end in ("Why?", "How?", "When?" * 9)}
    assert len(found) == 1
    spread = Counter(post(proxy, GENERATE, {"text_input": f"{number} " * 50}) for number in range(40))
    assert set(spread) == set(NAMES)
    sessions = {post(alone(proxy), INFER, {"inputs": number}, {"x-session": "ana"}) for number in range(5)}
    assert len(sessions) == 1
    assert {post(proxy, INFER, {"inputs": 0}) for _ in range(6)} == set(NAMES), "token ids go round"


@needs_haproxy
def test_the_candidate_gets_its_share(proxy: Proxy) -> None:
    def share(requests: int, headers: dict[str, str] | None = None) -> float:
        return sum(post(proxy, INFER, {}, headers) == CANDIDATE for _ in range(requests)) / requests

    assert share(20) == 0
    proxy.set_share(0.25)
    assert abs(share(400) - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert share(20, {"x-session": "ana"}) in (0, 1), "who has a session meets one version"
    assert share(20, {"x-release": "candidate"}) == 1
    assert share(20, {"x-release": "live"}) == 0
    proxy.set_share(1.0)
    assert share(20) == 1
    proxy.switch_off(CANDIDATE)
    assert share(20) == 0, "without a candidate the live servers answer"
    assert proxy.in_rotation() == set(NAMES)
    proxy.switch_off(NAMES[0])
    assert proxy.in_rotation() == {*NAMES[1:]}


@needs_haproxy
def test_a_request_whose_server_dies_is_repeated_elsewhere(tmp_path: Path) -> None:
    dies = threading.Event()
    with ExitStack() as running:
        proxy = running.enter_context(Proxy(settings(tmp_path / "proxy"), tmp_path / "proxy.log"))
        proxy.switch_on(NAMES[0], running.enter_context(upstream(NAMES[0], dies)))  # type: ignore[arg-type]
        proxy.switch_on(NAMES[1], running.enter_context(upstream(NAMES[1])))  # type: ignore[arg-type]
        proxy.switch_on(NAMES[2], Upstream(f"127.0.0.1:{free_port()}"))  # type: ignore[arg-type]
        assert {post(proxy, INFER, {}) for _ in range(6)} == {NAMES[0], NAMES[1]}, "one refuses connections"
        dies.set()
        assert {post(proxy, INFER, {}) for _ in range(6)} == {NAMES[1]}


@needs_haproxy
def test_an_answer_whose_head_is_cut_off_is_repeated_elsewhere(tmp_path: Path) -> None:
    dies = threading.Event()
    dies.set()
    with ExitStack() as running:
        proxy = running.enter_context(Proxy(settings(tmp_path / "proxy"), tmp_path / "proxy.log"))
        cut = upstream(NAMES[0], dies, last_words=b"HTTP/1.1 200 OK\r\nContent-")
        proxy.switch_on(NAMES[0], running.enter_context(cut))  # type: ignore[arg-type]
        proxy.switch_on(NAMES[1], running.enter_context(upstream(NAMES[1])))  # type: ignore[arg-type]
        assert {post(proxy, INFER, {}) for _ in range(4)} == {NAMES[1]}


@needs_haproxy
def test_what_cannot_be_repeated_says_so(tmp_path: Path) -> None:
    dies = threading.Event()
    dies.set()
    begun = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n'
    with ExitStack() as running:
        proxy = running.enter_context(Proxy(settings(tmp_path / "proxy"), tmp_path / "proxy.log"))
        assert refusal(proxy, {}) == (503, "No server takes requests at the moment. Ask again.")
        silent = running.enter_context(upstream(NAMES[0], dies))
        proxy.switch_on(NAMES[0], silent)  # type: ignore[arg-type]
        status, told = refusal(proxy, {"text_input": "secret words " * BUFFER_BYTES})
        assert (status, f"its body is longer than {BUFFER_BYTES} bytes" in told) == (502, True)
        proxy.switch_off(NAMES[0])
        broken = upstream(NAMES[1], dies, last_words=begun)
        proxy.switch_on(NAMES[1], running.enter_context(broken))  # type: ignore[arg-type]
        with pytest.raises(IncompleteRead):
            post(proxy, GENERATE, {"text_input": "secret words"})
    log = (tmp_path / "proxy.log").read_text()
    assert [line.split(" ")[9] for line in log.splitlines() if f"POST {GENERATE}" in line] == ["SC--", "SH--", "SD--"]
    assert "secret" not in log


@needs_haproxy
def test_a_server_that_refused_a_connection_gets_requests_again_once_it_takes_one(tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as running:
        proxy = running.enter_context(Proxy(settings(tmp_path / "proxy"), tmp_path / "proxy.log"))
        proxy.switch_on(NAMES[0], Upstream(f"127.0.0.1:{port}"))  # type: ignore[arg-type]
        proxy.switch_on(NAMES[1], running.enter_context(upstream(NAMES[1])))  # type: ignore[arg-type]
        while NAMES[0] in proxy.in_rotation():
            assert post(proxy, INFER, {}) == NAMES[1]
        running.enter_context(upstream(NAMES[0], port=port))
        while NAMES[0] not in proxy.in_rotation():
            assert post(proxy, INFER, {}) in NAMES[:2]  # it may come back between the look and the request
        assert {post(proxy, INFER, {}) for _ in range(4)} == {*NAMES[:2]}


@needs_haproxy
@pytest.mark.parametrize("dead", NAMES[:2])
def test_a_busy_replica_takes_the_texts_of_a_dead_one(tmp_path: Path, dead: str) -> None:
    answers = threading.Event()
    alive = next(name for name in NAMES[:2] if name != dead)
    texts = 24
    with ExitStack() as running:
        proxy = running.enter_context(Proxy(settings(tmp_path / "proxy"), tmp_path / "proxy.log"))
        proxy.switch_on(alive, running.enter_context(upstream(alive, answers=answers)))  # type: ignore[arg-type]
        proxy.switch_on(dead, Upstream(f"127.0.0.1:{free_port()}"))  # type: ignore[arg-type]
        with ThreadPoolExecutor(texts) as clients:
            asked = [
                clients.submit(post, proxy, GENERATE, {"text_input": f"{number} " * 50}) for number in range(texts)
            ]
            # all of them wait with the one that lives, which is more than its share of two
            while proxy.in_flight(alive) < texts and not any(one.done() for one in asked):
                pass
            answers.set()
            assert [one.result() for one in asked] == [alive] * texts


@needs_haproxy
def test_what_would_reach_one_server_is_refused(proxy: Proxy) -> None:
    for path in ("/v2/repository/models/m/load", "/v2/systemsharedmemory/status", "/v2/trace/setting", "/v2/logging"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            post(proxy, path, {})
    assert post(proxy, INFER, {}, {ADMIN_HEADER: "a guess"}) in NAMES, "the header that opens it is taken off"


@needs_haproxy
def test_only_who_has_a_key_is_served(tmp_path: Path) -> None:
    with ExitStack() as running:
        closed = settings(tmp_path / "proxy", has_keys=True)
        proxy = running.enter_context(Proxy(closed, tmp_path / "proxy.log", keys=["first", "second"]))
        proxy.switch_on(NAMES[0], running.enter_context(upstream(NAMES[0])))  # type: ignore[arg-type]
        for key in ("first", "second"):
            assert post(proxy, INFER, {}, {"Authorization": f"Bearer {key}"}) == NAMES[0]
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "first"}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                post(proxy, INFER, {}, headers)
        text = "".join(path.read_text() for path in (tmp_path / "proxy").iterdir() if path.is_file())
        assert "first" not in text, "a key lies on the disk"


@needs_haproxy
def test_a_proxy_that_was_killed_comes_back_with_its_orders(proxy: Proxy) -> None:
    proxy.set_share(1.0)
    assert proxy._process is not None
    proxy._process.kill()
    proxy._process.wait()
    assert proxy.ensure_running()
    assert not proxy.ensure_running()
    assert post(proxy, INFER, {}) == CANDIDATE


@needs_haproxy
def test_counters_of_the_pools(proxy: Proxy) -> None:
    before = proxy.answers(Pool.live)
    for _ in range(3):
        post(proxy, INFER, {})
    assert proxy.answers(Pool.live) == (before[0] + 3, before[1])
    assert proxy.in_flight(NAMES[0]) == 0


def test_a_missing_proxy_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ServerError, match=r"needs HAProxy, .* apt-get install haproxy; or set serve.replicas=0"):
        check_proxy_available()
