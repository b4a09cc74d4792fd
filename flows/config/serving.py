"""The model repository, its proof, and the inference server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from flows.config.canary import CanaryConfig
from flows.config.checks import require, require_positive

AUTO_CANDIDATE = "auto"
NO_CANDIDATE = "none"
MAX_REPLICAS = 64
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
MAX_BODY_BYTES = 4 * 10**6
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class CacheDtype(StrEnum):
    """In what the keys and values of past tokens are kept."""

    float32 = "float32"
    int8 = "int8"
    fp8 = "fp8"


class Pooling(StrEnum):
    """How the hidden states of a text's tokens become its embedding."""

    mean = "mean"
    last = "last"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """One candidate to a runnable program and its model repository entry."""

    max_batch_size: int = 8
    """Largest batch that the inference server forms."""
    max_queue_delay_us: int = 0
    """Microseconds that a request may wait for others to share its batch. A lone one waits that long, too; with 0,
    those that come while the model is busy share the next batch."""
    instances: int = 1
    """Copies of the model that serve in parallel."""
    threads: int = 0
    """Threads of each instance, and of each of its ranks; 0 = the runtime's choice."""
    pipeline_stages: int = 1
    """Ranks that an instance is split over, for a model too large for one: each is a process that loads its own layers
    and keeps their keys and values alone; hidden states pass from one to the next (GPipe, arXiv:1811.06965)."""
    max_new_tokens: int = 256
    """Most tokens that one text request may ask for; never more than data.sequence_length."""
    max_running: int = 16
    """Texts that are generated at the same time; each step computes one token of every one."""
    max_waiting: int = 256
    """Texts that may wait for their turn; more are refused."""
    prefill_tokens: int = 256
    """Prompt tokens computed in one step, so that long prompts do not hold up the texts that run."""
    cache_mb: int = 256
    """Megabytes (10^6 bytes) for keys and values of all running texts; each reserves all that it may need."""
    cache_dtype: CacheDtype = CacheDtype.float32
    """`float32`, or with a code step for each token and head, 4 K / (K + 4) x the tokens at head width K: `int8`, or
    `fp8` (E4M3), which keeps less of large numbers and more of small ones."""
    pooling: Pooling = Pooling.mean
    """What of the last layer's hidden states, after the final norm, is a text's embedding: the `mean` of all its tokens
    (Sentence-BERT, arXiv:1908.10084) or the `last` token's; always scaled to length 1."""
    encrypt_weights: bool = False
    """Encrypt what is published (AES-256-GCM). The key is 64 hexadecimal digits in MILLRACE_WEIGHTS_KEY, or in a file
    that MILLRACE_WEIGHTS_KEY_PATH names and nobody else may read: when it is published, and where it is served."""

    def __post_init__(self) -> None:
        require_positive(
            "export",
            self,
            [
                "max_batch_size",
                "instances",
                "pipeline_stages",
                "max_new_tokens",
                "max_running",
                "max_waiting",
                "prefill_tokens",
                "cache_mb",
            ],
        )
        require(
            self.max_queue_delay_us >= 0,
            "export.max_queue_delay_us",
            self.max_queue_delay_us,
            "must not be negative",
            "Set it to 0 to never wait.",
        )
        require(
            self.threads >= 0,
            "export.threads",
            self.threads,
            "must not be negative",
            "Set it to 0 for the runtime's choice.",
        )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """How the served model is compared with the trained one."""

    lengths: tuple[int, ...] = (1, 2, 17, 64)
    """Token counts compared for every batch size; the longest context is always added."""
    real_inputs: int = 16
    """Inputs taken from the test split; as many random ones are made afresh."""
    noise_factor: float = 4.0
    """Tolerance as a multiple of the checkpoint's float32 error: its largest difference from float64, same inputs."""
    text_prompts: int = 4
    """Prompts whose greedy continuation must be equal, token by token."""
    text_new_tokens: int = 16
    """Most tokens of each of those continuations."""

    def __post_init__(self) -> None:
        require_positive("verify", self, ["real_inputs", "noise_factor", "text_prompts", "text_new_tokens"])
        require(
            all(length > 0 for length in self.lengths),
            "verify.lengths",
            list(self.lengths),
            "must all be greater than 0",
            "Set verify.lengths=[1,17,64].",
        )


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Which candidate becomes a version, under what name, where."""

    model_name: str = "millrace"
    """Served name; `<name>_text` is its text in, text out companion."""
    model_repo: Path = Path("model_repo")
    """Directory that the inference server loads from; versions of a model stand there side by side."""
    candidate: str = AUTO_CANDIDATE
    """`auto`: the fastest candidate that passes every gate; or a candidate's name; `none`: the run ends with the gates
    and the report, and nothing is exported to the server."""
    keep_versions: int = 2
    """Newest versions that the inference server keeps loaded; older ones stay on disk."""
    live: bool = True
    """Serve the version at once; false = it becomes the candidate, for `python -m flows.promote`."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(MODEL_NAME, self.model_name) is not None,
            "publish.model_name",
            self.model_name,
            "must be 1-64 letters, digits, '_' or '-', the first no sign: it names a directory and a URL",
            "Set publish.model_name=my_model.",
        )
        require(
            self.keep_versions >= 2,
            "publish.keep_versions",
            self.keep_versions,
            "must be 2 or more: while a server switches, requests still in flight need the version before",
            "Set publish.keep_versions=2.",
        )


@dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """Traces of requests, to OpenTelemetry: which model and version, and when each part began; no content."""

    url: str | None = None
    """Collector that takes OTLP over HTTP, e.g. http://127.0.0.1:4318/v1/traces; null = none."""
    one_in: int = 100
    """One of so many requests is traced."""

    def __post_init__(self) -> None:
        require_positive("serve.tracing", self, ["one_in"])
        require(
            self.url is None or re.fullmatch(r"https?://[^\s,]+", self.url) is not None,
            "serve.tracing.url",
            self.url,
            "must begin with http:// or https:// and hold neither spaces nor commas",
            "Set serve.tracing.url=http://127.0.0.1:4318/v1/traces.",
        )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The inference server that `python -m flows.serve` runs."""

    host: str = "127.0.0.1"
    """Address of the public endpoint (openai_port). The ports of the server itself stay on loopback."""
    accept_unguarded_ports: bool = False
    """Bind the server's own ports (HTTP, gRPC, metrics) to `host`, too. They ask for no key, and anybody who reaches
    them can end the embedded server with one request: only behind a proxy of your own."""
    http_port: int = 8000
    """Of the server's HTTP interface (KServe's v2 protocol); 0 = any, here and below."""
    grpc_port: int = 8001
    """Of the same over gRPC."""
    metrics_port: int = 8002
    """Of its metrics, in Prometheus' format."""
    openai_port: int | None = None
    """Of the public endpoint: an HTTP interface like OpenAI's (/v1/completions, /v1/chat/completions, /v1/embeddings,
    /v1/models), and health, metadata and inference below /v2, each request checked before the server sees it;
    null = none, 0 = any."""
    api_keys_path: Path | None = None
    """File of keys, one a line, one of which requests to that endpoint must carry, and all requests where
    serve.replicas puts a proxy before the servers (`Authorization: Bearer`); nobody else may read it."""
    max_body_bytes: int = 2 * 10**6
    """Longest body that the public endpoint takes. The embedded server ends at a JSON body of about 5 MB."""
    max_connections: int = 512
    """Connections to the public endpoint at the same time; more are answered with 503 at once."""
    startup_timeout_s: int = 120
    """Seconds until the server and its models have to be ready."""
    exit_timeout_s: int = 10
    """Seconds given to requests in flight when the server is asked to stop."""
    poll_interval_s: float = 1.0
    """How often the model repository is looked at for a newly published version."""
    replicas: int = 0
    """Servers of the live version behind HAProxy, which splits traffic for a canary; 0 = one server without a proxy."""
    tls_certificate_path: Path | None = None
    """PEM file of certificate and key with which HAProxy encrypts all that it serves but metrics; null = plain text."""
    probe_interval_s: float = 2.0
    """Seconds between two inferences with which each replica's health is found out."""
    probe_timeout_s: float = 60.0
    """A replica that answers no inference for so many seconds is killed and started again."""
    drift_port: int = 8003
    """Of the metrics that say how far every server has drifted from the answers that its passport recorded."""
    drift_interval_s: float = 60.0
    """Seconds between two rounds in which every server is asked the passport's samples."""
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)

    def __post_init__(self) -> None:
        seconds = ["startup_timeout_s", "exit_timeout_s", "poll_interval_s", "probe_interval_s", "probe_timeout_s"]
        counts = ["drift_interval_s", "max_body_bytes", "max_connections"]
        require_positive("serve", self, [*seconds, *counts])
        require(
            0 <= self.replicas <= MAX_REPLICAS,
            "serve.replicas",
            self.replicas,
            f"must lie between 0 and {MAX_REPLICAS}",
            "Set serve.replicas=2.",
        )
        require(
            self.tls_certificate_path is None or self.replicas > 0,
            "serve.tls_certificate_path",
            self.tls_certificate_path,
            "needs the proxy, and serve.replicas=0 has none: the server's own HTTP has no TLS",
            "Set serve.replicas=1 or more.",
        )
        names = ("http_port", "grpc_port", "metrics_port", "drift_port", "openai_port")
        ports = [getattr(self, name) or 0 for name in names]
        for name, port in zip(names, ports, strict=True):
            require(
                0 <= port <= 65535,
                f"serve.{name}",
                port,
                "must lie between 0 and 65535",
                "Set it to 0 for any free port.",
            )
        require(
            self.max_body_bytes <= MAX_BODY_BYTES,
            "serve.max_body_bytes",
            self.max_body_bytes,
            f"must not exceed {MAX_BODY_BYTES}: a longer JSON body ends the embedded server",
            f"Set serve.max_body_bytes={MAX_BODY_BYTES}.",
        )
        guarded = self.openai_port is not None or self.replicas > 0
        require(
            self.host in LOOPBACK or guarded or self.accept_unguarded_ports,
            "serve.host",
            self.host,
            "is reachable from other machines, and the server's own ports, which stay on loopback, ask for no key and "
            "do not survive a request that is made to end them",
            "Set serve.openai_port=8080 and serve.api_keys_path=keys.txt for the guarded endpoint, or, behind a proxy "
            "of your own, serve.accept_unguarded_ports=true.",
        )
        require(
            not guarded or self.api_keys_path is not None or self.host in LOOPBACK,
            "serve.host",
            self.host,
            "is reachable from other machines, and serve.api_keys_path is null: anybody could use the models",
            "Set serve.api_keys_path=keys.txt, or serve.host=127.0.0.1.",
        )
        require(
            guarded or self.api_keys_path is None,
            "serve.api_keys_path",
            self.api_keys_path,
            "would be asked for by nobody: the server's own ports know no keys",
            "Set serve.openai_port=8080 for the guarded endpoint, or serve.replicas=1 or more.",
        )
        taken = [port for port in ports if port]
        require(
            len(set(taken)) == len(taken),
            "serve.http_port",
            self.http_port,
            f"and the other ports must differ, not {ports}",
            "Set serve.grpc_port and serve.metrics_port to other numbers.",
        )

    @property
    def server_host(self) -> str:
        """Address of the server's own ports."""
        return self.host if self.accept_unguarded_ports or self.host in LOOPBACK else LOOPBACK[0]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What the program that generates text depends on, besides its model."""

    cache_dtype: CacheDtype = CacheDtype.float32
    pipeline_stages: int = 1
    """Parts that it is made in."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How a program is made in parts."""

    pipeline_stages: int


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """What the model repository entry of one candidate depends on, besides its program."""

    model_name: str
    keep_versions: int
    sequence_length: int
    """Longest context, in tokens."""
    export: ExportConfig


@dataclass(frozen=True, kw_only=True)
class PassportConfig:
    """What the proof that the served model is the trained one depends on, besides the models."""

    model_name: str
    sequence_length: int
    """Longest context, in tokens."""
    seed: int
    """Mixed with a fresh one, so that no two proofs use the same inputs."""
    export: ExportConfig
    verify: VerifyConfig

    def __post_init__(self) -> None:
        require(
            self.verify.text_new_tokens <= self.export.max_new_tokens,
            "verify.text_new_tokens",
            self.verify.text_new_tokens,
            f"must not exceed export.max_new_tokens={self.export.max_new_tokens}: the served model refuses more",
            f"Set verify.text_new_tokens={self.export.max_new_tokens}.",
        )
