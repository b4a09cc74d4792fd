"""haproxy.cfg, generated: how requests find a replica, and which are repeated when one dies.

- **Pools.** `live` and, during a canary, `candidate`. A draw for each request decides; requests with the same
  `x-session` header always draw the same. The share lies in a map that is changed while the proxy runs. The header
  `x-release: candidate`, or `live`, asks for a pool. Without a ready candidate everything goes to the live servers.
- **Affinity.** Requests with the same `x-session`, or else texts with the same beginning, go to the same replica by a
  consistent hash with bounded loads (arXiv:1608.01350), because it holds the keys and values of that beginning. Token
  ids to score go round.
- **Health.** The server says "ready" with dead models, so the replicas' supervisors, which infer, switch servers on and
  off through the admin socket. Until they have noticed a death the proxy helps itself: a server that refuses a
  connection gets no more requests until it takes one. Else those that wait for it would be sent to it again and again,
  because the others already have more than their share of the load, and no server is left out for having failed.
- **Repeated** on another replica are requests whose connection was refused, or ended before the head of the answer was
  whole: inference changes nothing, also where it draws without a seed, so doing it twice harms nobody. Each refusal
  takes a server out, so the number of repeats reaches the last replica that lives.
- **Not repeated** are answers that have begun, because their reader has seen a part: over HTTP/1.1 they end without the
  last chunk, over HTTP/2 with a reset, which gRPC calls CANCELLED; requests of more than `BUFFER_BYTES`, which the
  proxy cannot keep (502); and gRPC streams, which may go on (UNAVAILABLE). Their clients may repeat them. Ours say that
  the answer broke off and after how much of it; our OpenAI interface asks again for what had not begun.
- **Errors** of the proxy's own are JSON like the server's, and say whether asking again helps. What failed or was
  repeated stands in the proxy's log, with HAProxy's word for how it ended, and no text of a user.
- **Closed.** What changes or asks one server instead of the service: loading, shared memory, tracing, logging,
  statistics; the header that would open it is taken off. With a file of keys, requests without one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.serving.endpoint import ADMIN_HEADER, GRPC_ADMIN_HEADER
from flows.serving.releases.served_view import Pool

BUFFER_BYTES = 262_144
MAX_CONNECTIONS = 2048
SESSION_BYTES = 256
"""Beginning of a text that decides which replica gets it: about a system prompt's first sentences."""
DRAWS = 10_000
"""The share of a canary is exact to one part of so many."""
LONGEST_ANSWER_S = 600
LONGEST_BODY_S = 60
RETRIES = 3
"""Of a request, besides one for each replica."""
RECOVERY_MS = 500
"""How often a server that refused a connection is tried again."""
LOAD_BOUND_PERCENT = 150
"""No replica gets more than this share of the mean load for the sake of affinity."""
CANDIDATE = "candidate"
ERRORS = {
    400: "This is no HTTP request that can be passed on.",
    408: f"The request did not arrive within {LONGEST_BODY_S} s.",
    500: "The proxy failed. Ask again.",
    502: "The server ended before it had answered, and the request was not repeated on another one: its body is longer "
    f"than {BUFFER_BYTES} bytes, or others ended, too. Ask again.",
    503: "No server takes requests at the moment. Ask again.",
    504: f"The server did not answer within {LONGEST_ANSWER_S} s.",
}
"""What the proxy itself answers, by status."""
HTTP_PATHS = (
    r"^/v2(/health/(live|ready)|/models/[^/]+(/versions/[0-9]+)?"
    r"(/ready|/config|/infer|/generate|/generate_stream)?)?/?$"
)
GRPC_PATHS = (
    r"^/inference\.GRPCInferenceService/"
    r"(Server(Live|Ready|Metadata)|Model(Ready|Metadata|Config|Infer|StreamInfer))$|^/grpc\.health\.v1\.Health/"
)


@dataclass(frozen=True)
class ProxySettings:
    """What the generated configuration depends on; addresses are `host:port`."""

    directory: Path
    """Holds the admin socket, the map with the share, and the digests of keys."""
    replicas: Sequence[str]
    """Names of the live pool's servers."""
    http_address: str
    grpc_address: str
    metrics_address: str
    openai_address: str | None
    openai_server: str | None
    """Where the interface like OpenAI's itself listens."""
    inner_grpc_address: str
    """For our own interface: without TLS and keys, on loopback."""
    certificate: Path | None
    has_keys: bool

    @property
    def admin_socket(self) -> Path:
        """Where orders are taken."""
        return self.directory / "admin.sock"

    @property
    def shares(self) -> Path:
        """Map with the share of the canary, in draws."""
        return self.directory / "shares.map"

    @property
    def key_digests(self) -> Path:
        """sha256 of `Bearer <key>` of each key; so the proxy holds no key, and comparing tells none."""
        return self.directory / "keys.sha256"


def backend_name(pool: Pool, protocol: str) -> str:
    """Name of the servers of a pool that speak `http` or `grpc`."""
    return f"{pool}_{protocol}"


def render(settings: ProxySettings) -> str:
    """The text of haproxy.cfg."""
    tls = f" ssl crt {settings.certificate}" if settings.certificate else ""
    plain_grpc = "" if tls else " proto h2"
    blocks = [
        _globals(settings),
        _frontend(
            settings, "http", settings.http_address, tls and f"{tls} alpn h2,http/1.1", _guard(settings, HTTP_PATHS)
        ),
        _frontend(
            settings,
            "grpc",
            settings.grpc_address,
            f"{tls} alpn h2" if tls else plain_grpc,
            _guard(settings, GRPC_PATHS),
        ),
        _frontend(settings, "grpc", settings.inner_grpc_address, " proto h2", [], name="inner_grpc"),
        *(_backend(pool, protocol, settings.replicas) for pool in Pool for protocol in ("http", "grpc")),
        _metrics(settings),
    ]
    if settings.openai_address and settings.openai_server:
        guard = "\n".join(f"  {line}" for line in _guard(settings, "^/v1/"))
        blocks.append(
            f"frontend openai\n  bind {settings.openai_address}{tls and f'{tls} alpn h2,http/1.1'}\n{guard}\n"
            f"  default_backend openai\n\nbackend openai\n  server openai {settings.openai_server}\n"
        )
    return "\n".join(blocks)


def _globals(settings: ProxySettings) -> str:
    errors = "\n".join(f"  http-error status {status} {_as_json(told)}" for status, told in ERRORS.items())
    return f"""\
global
  maxconn {MAX_CONNECTIONS}
  tune.bufsize {BUFFER_BYTES}
  stats socket {settings.admin_socket} mode 600 level admin
  log stdout format raw local0 notice
  ssl-default-bind-options ssl-min-ver TLSv1.2

defaults
  mode http
  log global
  option httplog
  option dontlog-normal
  option log-separate-errors
  timeout connect 2s
  timeout http-request {LONGEST_BODY_S}s
  timeout client {LONGEST_ANSWER_S}s
  timeout server {LONGEST_ANSWER_S}s
  timeout queue 60s
  timeout tunnel {LONGEST_ANSWER_S}s
  option redispatch 1
  option http-no-delay
  retries {RETRIES + len(settings.replicas)}
  retry-on conn-failure empty-response junk-response
{errors}
"""


def _as_json(error: str) -> str:
    return f'content-type application/json string "{{\\"error\\":\\"{error}\\"}}"'


def _guard(settings: ProxySettings, paths: str) -> list[str]:
    """Rules that refuse what has no key, and what concerns one server."""
    rules = []
    if settings.has_keys:
        known = f"{{ req.hdr(authorization),sha2(256),hex -m str -i -f {settings.key_digests} }}"
        told = "The Authorization header holds none of the keys that may use this."
        rules.append(f"http-request return status 401 {_as_json(told)} unless {known}")
    told = "Not offered here: it would reach one of several servers."
    return [*rules, f"http-request return status 403 {_as_json(told)} unless {{ path -m reg '{paths}' }}"]


def _frontend(
    settings: ProxySettings, protocol: str, address: str, options: str, guard: Sequence[str], name: str = ""
) -> str:
    is_text = "path_end /ModelStreamInfer" if protocol == "grpc" else "path_sub /generate"
    # A gRPC message begins with its length and the names of inputs; their bytes, 4 of length first, are field 7.
    beginning = f"ungrpc(7),bytes(4,{SESSION_BYTES})" if protocol == "grpc" else f"bytes(0,{SESSION_BYTES})"
    rules = [
        *guard,
        f"http-request del-header {GRPC_ADMIN_HEADER if protocol == 'grpc' else ADMIN_HEADER}",
        "http-request set-var(txn.session) req.hdr(x-session) if { req.hdr(x-session) -m found }",
        f"http-request set-var(txn.draw) rand({DRAWS})",
        f"http-request set-var(txn.draw) req.hdr(x-session),xxh32(1),mod({DRAWS}) if {{ req.hdr(x-session) -m found }}",
        f"http-request set-var(txn.share) str({CANDIDATE}),map_str_int({settings.shares},0)",
        f"http-request set-var(txn.share) int({DRAWS}) if {{ req.hdr(x-release) {CANDIDATE} }}",
        "http-request set-var(txn.share) int(0) if { req.hdr(x-release) live }",
        # HAProxy repeats only what it has whole before it passes the first byte on.
        f"http-request wait-for-body time {LONGEST_BODY_S}s if METH_POST !{{ path_end /ModelStreamInfer }}",
        # A stream stays open; its first message comes whole, maybe long after the stream.
        f"http-request wait-for-body time {LONGEST_ANSWER_S}s at-least 8 if {{ path_end /ModelStreamInfer }}",
        f"http-request set-var(txn.session) req.body,{beginning} if {{ {is_text} }} !{{ var(txn.session) -m found }}",
        f"use_backend {backend_name(Pool.candidate, protocol)} if {{ var(txn.draw),sub(txn.share) lt 0 }} "
        f"{{ srv_is_up({backend_name(Pool.candidate, protocol)}/{CANDIDATE}) }}",
        f"default_backend {backend_name(Pool.live, protocol)}",
    ]
    lines = "\n".join(f"  {rule}" for rule in rules)
    return f"frontend {name or protocol}\n  bind {address}{options}\n{lines}\n"


def _backend(pool: Pool, protocol: str, replicas: Sequence[str]) -> str:
    speaks = " proto h2" if protocol == "grpc" else ""
    live = [f"  server {name} 127.0.0.1:1{speaks} disabled" for name in replicas]
    if pool is Pool.candidate:  # what the candidate's server cannot answer any more, the live ones do
        servers = [f"  server {CANDIDATE} 127.0.0.1:1{speaks} disabled", *(f"{line} backup" for line in live)]
    else:
        servers = live
    lines = "\n".join(servers)
    return f"""\
backend {backend_name(pool, protocol)}
  balance hash var(txn.session)
  hash-type consistent
  hash-balance-factor {LOAD_BOUND_PERCENT}
  option allbackups
  default-server check inter 1h downinter {RECOVERY_MS}ms fastinter {RECOVERY_MS}ms rise 1 fall 1
  default-server observe layer4 error-limit 1 on-error mark-down
  http-response set-header x-served-by %b/%s
{lines}
"""


def _metrics(settings: ProxySettings) -> str:
    names = [*settings.replicas, CANDIDATE]
    servers = "\n".join(
        f"backend metrics_{name}\n  http-request set-path /metrics\n  server {name} 127.0.0.1:1 disabled\n"
        for name in names
    )
    routes = "\n".join(f"  use_backend metrics_{name} if {{ path /metrics/{name} }}" for name in names)
    return f"""\
frontend metrics
  bind {settings.metrics_address}
  http-request return status 404 unless {{ path_beg /metrics }}
  http-request use-service prometheus-exporter if {{ path /metrics }}
{routes}

{servers}"""
