"""kubernetes.yaml: replaceable pods of the inference server behind a service that only the cluster reaches."""

from __future__ import annotations

import math
from typing import Any

from flows.config.manifests import ManifestsConfig
from flows.config.serving import ServeConfig
from flows.serving.manifests.container import GRPC_PORT, HTTP_PORT, METRICS_PORT, MODELS_DIR, ServedModels, stop_seconds

SCHEMA = "the strict schemas of Kubernetes"
NAME = "millrace-server"
LABELS = {"app.kubernetes.io/name": NAME}
PORTS = {"http": HTTP_PORT, "grpc": GRPC_PORT, "metrics": METRICS_PORT}
PROBE_PERIOD_S = 10
SECRET_KEY = "key"


def manifests(config: ManifestsConfig, options: ServeConfig, served: ServedModels) -> list[dict[str, Any]]:
    """Content of kubernetes.yaml: a deployment, its service, and what may reach it."""
    ports = [{"name": name, "port": port, "targetPort": name} for name, port in PORTS.items()]
    versions = "; ".join(f"{name} {version}" for name, version in served.versions.items())
    return [
        _object(
            config,
            "apps/v1",
            "Deployment",
            {
                "replicas": config.replicas,
                "selector": {"matchLabels": LABELS},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
                "template": {
                    # another version is another pod: applying the file is the switch
                    "metadata": {
                        "labels": LABELS,
                        "annotations": {"millrace/versions": versions},
                    },
                    "spec": _pod(config, options, served),
                },
            },
        ),
        _object(config, "v1", "Service", {"type": "ClusterIP", "selector": LABELS, "ports": ports}),
        _object(
            config,
            "networking.k8s.io/v1",
            "NetworkPolicy",
            {
                "podSelector": {"matchLabels": LABELS},
                "policyTypes": ["Ingress", "Egress"],  # it asks nobody
                "ingress": [
                    {
                        "from": [{"podSelector": {}}],  # of the same namespace
                        "ports": [{"protocol": "TCP", "port": port} for port in PORTS],
                    }
                ],
            },
        ),
    ]


def _object(config: ManifestsConfig, version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": NAME, "namespace": config.namespace, "labels": LABELS}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _pod(config: ManifestsConfig, options: ServeConfig, served: ServedModels) -> dict[str, Any]:
    mounts = [
        {"name": "models", "mountPath": MODELS_DIR, "readOnly": True},
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    memory = {"medium": "Memory", "sizeLimit": f"{config.shared_memory_mb}Mi"}
    gpus = {"nvidia.com/gpu": str(config.gpus)} if config.gpus else {}
    resources = {"cpu": str(config.cpus), "memory": f"{config.memory_mb}Mi", **gpus}
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": config.weights_key_secret, "key": SECRET_KEY}}}
        for name in served.environment
    ]
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "nodeSelector": {"kubernetes.io/arch": served.machine},
        "terminationGracePeriodSeconds": stop_seconds(options),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": config.user_id,
            "runAsGroup": config.user_id,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "server",
                "image": config.image,
                "args": served.arguments(options),
                **({"env": secrets} if secrets else {}),
                "ports": [{"name": name, "containerPort": port} for name, port in PORTS.items()],
                "resources": {"requests": resources, "limits": resources},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                **_probes(options, served),
                "volumeMounts": mounts,
            }
        ],
        "volumes": [
            {"name": "models", "persistentVolumeClaim": {"claimName": config.volume_claim, "readOnly": True}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "shared-memory", "emptyDir": memory},
        ],
    }


def _probes(options: ServeConfig, served: ServedModels) -> dict[str, Any]:
    """All three by inference: with dead models the server says that it is ready."""
    probe = {
        "exec": {"command": served.probe(options)},
        "periodSeconds": PROBE_PERIOD_S,
        "timeoutSeconds": math.ceil(options.probe_timeout_s),
    }
    starts = math.ceil(options.startup_timeout_s / PROBE_PERIOD_S)
    return {
        "startupProbe": {**probe, "failureThreshold": starts},
        "readinessProbe": {**probe, "failureThreshold": 1},
        "livenessProbe": {**probe, "failureThreshold": 2},
    }
