"""The model repository, its proof, and the inference server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flows.config.checks import require, require_positive

AUTO_CANDIDATE = "auto"
NO_CANDIDATE = "none"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """One candidate to a runnable program and its model repository entry."""

    max_batch_size: int = 8
    """Largest batch that the inference server forms."""
    max_queue_delay_us: int = 500
    """Microseconds that a request may wait for others to share its batch."""
    instances: int = 1
    """Copies of the model that serve in parallel."""
    threads: int = 0
    """Threads of each instance; 0 = the runtime's choice."""
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

    def __post_init__(self) -> None:
        require_positive(
            "export",
            self,
            [
                "max_batch_size",
                "instances",
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
    candidate: str = AUTO_CANDIDATE
    """`auto`: the fastest candidate that passes every gate; or a candidate's name; `none`: the run ends with the gates
    and the report, and nothing is exported to the server."""
    keep_versions: int = 2
    """Newest versions that the inference server keeps loaded; older ones stay on disk."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.model_name) is not None,
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
class ServeConfig:
    """The inference server that `python -m flows.serve` runs."""

    host: str = "127.0.0.1"
    """Address to bind; the embedded server has unpatched CVEs, so loopback unless a proxy stands before it."""
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    openai_port: int | None = None
    """Of an HTTP interface like OpenAI's (/v1/completions, /v1/chat/completions, /v1/models); null = none, 0 = any."""
    api_keys_path: Path | None = None
    """File of keys, one a line, one of which requests to that interface must carry; nobody else may read it."""
    startup_timeout_s: int = 120
    exit_timeout_s: int = 10
    """Seconds given to requests in flight when the server is asked to stop."""
    poll_interval_s: float = 1.0
    """How often the model repository is looked at for a newly published version."""

    def __post_init__(self) -> None:
        require_positive("serve", self, ["startup_timeout_s", "exit_timeout_s", "poll_interval_s"])
        names = ("http_port", "grpc_port", "metrics_port", "openai_port")
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
            self.openai_port is None or self.api_keys_path is not None or self.host in LOOPBACK,
            "serve.host",
            self.host,
            "is reachable from other machines, and serve.api_keys_path is null: anybody could use the models",
            "Set serve.api_keys_path=keys.txt, or serve.host=127.0.0.1.",
        )
        taken = [port for port in ports if port]
        require(
            len(set(taken)) == len(taken),
            "serve.http_port",
            self.http_port,
            f"and the other ports must differ, not {ports}",
            "Set serve.grpc_port and serve.metrics_port to other numbers.",
        )


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
