"""Where an inference server answers, and the key to what it keeps closed."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

from flows.serving.client import Client, Transport
from flows.serving.shared_memory import SharedMemoryClient

ADMIN_HEADER = "millrace-admin"
GRPC_ADMIN_HEADER = f"triton-grpc-protocol-{ADMIN_HEADER}"
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Endpoint:
    """A running inference server."""

    http: str
    """`host:port`, here and below."""
    grpc: str
    metrics: str | None = None
    """None: nobody said where its metrics are."""
    admin_key: str | None = field(default=None, repr=False)
    """Opens loading, unloading and shared memory; whoever started the server has it."""

    @property
    def http_headers(self) -> Mapping[str, str]:
        """What a request over HTTP carries to be let in to what is closed."""
        return {ADMIN_HEADER: self.admin_key} if self.admin_key else {}

    @property
    def grpc_headers(self) -> Mapping[str, str]:
        """The same over gRPC."""
        return {GRPC_ADMIN_HEADER: self.admin_key} if self.admin_key else {}

    def connect(self, transport: Transport) -> Client:
        """A connection of that kind, for one thread."""
        if transport is Transport.shared_memory:
            return SharedMemoryClient(self.grpc, self.grpc_headers)
        return Client(transport, self.http if transport is Transport.http else self.grpc)

    def loaded_files(self) -> dict[tuple[str, str], str]:
        """sha256 of the `files.json` that each model and version says it checked its files against when it loaded."""
        assert self.metrics is not None
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=TIMEOUT_S) as response:
            text = response.read().decode()
        found = {}
        for labels in re.findall(r"^millrace_version_info\{(.*)\} 1", text, re.MULTILINE):
            label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            found[label["model"], label["version"]] = label["files"]
        return found
