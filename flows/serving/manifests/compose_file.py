"""compose.yaml: one server in a container, reachable from this machine only."""

from __future__ import annotations

from typing import Any

from flows.config.manifests import ManifestsConfig
from flows.config.serving import ServeConfig
from flows.serving.manifests.container import GRPC_PORT, HTTP_PORT, METRICS_PORT, MODELS_DIR, ServedModels, stop_seconds

SCHEMA = "the schema of the Compose Specification"
PROBE_PERIOD_S = 10


def compose_file(config: ManifestsConfig, options: ServeConfig, served: ServedModels) -> dict[str, Any]:
    """Content of compose.yaml, beside which the directories `image` and `model_repository` lie.

    Ports are bound where `serve.host` may: on loopback, unless `serve.accept_unguarded_ports`. Compose restarts a
    server that ends; one that only stops to infer it shows as unhealthy.
    """
    host = f"[{options.server_host}]" if ":" in options.server_host else options.server_host
    ports = {HTTP_PORT: options.http_port, GRPC_PORT: options.grpc_port, METRICS_PORT: options.metrics_port}
    resources: dict[str, Any] = {"limits": {"cpus": str(config.cpus), "memory": f"{config.memory_mb}m"}}
    if config.gpus:
        devices = [{"driver": "nvidia", "count": config.gpus, "capabilities": ["gpu"]}]
        resources["reservations"] = {"devices": devices}
    secrets = {name: f"${{{name}:?decrypts the weights}}" for name in served.environment}
    server = {
        "image": config.image,
        "build": {"context": "./image"},
        "platform": f"linux/{served.machine}",
        "command": served.arguments(options),
        **({"environment": secrets} if secrets else {}),
        "labels": {f"millrace.{name}": version for name, version in served.versions.items()},
        "ports": [f"{host}:{outside or ''}:{inside}" for inside, outside in ports.items()],
        "volumes": [{"type": "bind", "source": "./model_repository", "target": MODELS_DIR, "read_only": True}],
        "user": f"{config.user_id}:{config.user_id}",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "shm_size": f"{config.shared_memory_mb}m",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {
            "test": ["CMD", *served.probe(options)],
            "interval": f"{PROBE_PERIOD_S}s",
            "timeout": f"{options.probe_timeout_s:g}s",
            "start_period": f"{options.startup_timeout_s}s",
            "retries": 2,
        },
        "stop_grace_period": f"{stop_seconds(options)}s",
        "restart": "unless-stopped",
        "deploy": {"resources": resources},
    }
    return {"name": "millrace", "services": {"server": server}}
