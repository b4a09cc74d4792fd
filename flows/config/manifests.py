"""How the inference server is run in containers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flows.config.checks import require, require_positive

DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
PINNED_IMAGE = r"[^\s:@]+(:\d+)?[^\s:@]*(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})"


@dataclass(frozen=True, kw_only=True)
class ManifestsConfig:
    """What `python -m flows.manifests` writes for Docker Compose and Kubernetes. Neither has been run here."""

    base_image: str = "nvcr.io/nvidia/tritonserver:26.09-py3"
    """Official image that the Dockerfile begins with; 26.09 is server 2.73.0, as old as the client in use."""
    image: str = "millrace-server:26.09"
    """Name of the image that the Dockerfile makes; for Kubernetes one that the cluster can pull."""
    namespace: str = "default"
    """Of Kubernetes."""
    replicas: int = 1
    """Pods that serve the live versions."""
    volume_claim: str = "model-repository"
    """PersistentVolumeClaim that holds the written model_repository, mounted read-only."""
    cpus: int = 2
    """Cores of each server."""
    memory_mb: int = 4096
    """Mebibytes of each server, shared memory included."""
    shared_memory_mb: int = 256
    """Mebibytes through which the server and its models exchange tensors."""
    gpus: int = 0
    """NVIDIA GPUs of each server, which `config.pbtxt` lets the scores model use."""
    user_id: int = 1000
    """User and group that the server runs as; 1000 is triton-server in the official image."""
    vllm: bool = False
    """Write vllm_repository, too: the live versions' checkpoints for the vLLM backend of the official image. What it
    serves has been compared with nothing, and its passport.json says so."""
    weights_key_secret: str = "millrace-weights"
    """Kubernetes Secret whose `key` decrypts what was published with export.encrypt_weights."""

    def __post_init__(self) -> None:
        positive = ["replicas", "cpus", "memory_mb", "shared_memory_mb", "user_id"]
        require_positive("manifests", self, positive)
        require(self.gpus >= 0, "manifests.gpus", self.gpus, "must not be negative", "Set manifests.gpus=0.")
        require(
            self.shared_memory_mb < self.memory_mb,
            "manifests.shared_memory_mb",
            self.shared_memory_mb,
            f"is part of manifests.memory_mb={self.memory_mb} and must be less",
            f"Set manifests.memory_mb={4 * self.shared_memory_mb}.",
        )
        for name in ("base_image", "image"):
            value = getattr(self, name)
            require(
                re.fullmatch(PINNED_IMAGE, value) is not None,
                f"manifests.{name}",
                value,
                "must end with a tag other than latest, or a digest: what is served must not change by itself",
                f"Set manifests.{name}={getattr(ManifestsConfig, name)}.",
            )
        for name in ("namespace", "volume_claim", "weights_key_secret"):
            value = getattr(self, name)
            require(
                re.fullmatch(DNS_LABEL, value) is not None,
                f"manifests.{name}",
                value,
                "must be 1-63 small letters, digits or '-', the first and the last no '-'",
                f"Set manifests.{name}={getattr(ManifestsConfig, name)}.",
            )
