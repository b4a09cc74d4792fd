# mypy: disable-error-code="no-untyped-call, import-untyped"
"""Compares config.pbtxt, on disk and as the server itself has it, with what the exported program's graph asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tritonclient.grpc  # has no types

from flows.config.serving import EntryConfig, PassportConfig
from flows.serving import config_pbtxt
from flows.serving.client import TIMEOUT_S
from flows.serving.endpoint import Endpoint
from flows.serving.proof.scores_check import Check

EMBEDDED = "configs/embedded.pbtxt"


def expected_configs(config: PassportConfig, program: Sequence[Path]) -> dict[str, config_pbtxt.ModelConfig]:
    """What each file below the model repository has to say, made anew from the program's graph.

    Args:
        config: Name and limits.
        program: ONNX file, or those of its parts.
    """
    entry = EntryConfig(
        model_name=config.model_name, keep_versions=2, sequence_length=config.sequence_length, export=config.export
    )
    inputs, outputs = config_pbtxt.read_graph(program)
    scores = {
        embedded: config_pbtxt.scores_config(entry, inputs, outputs, embedded=embedded) for embedded in (False, True)
    }
    return {
        f"{config.model_name}/config.pbtxt": scores[config_pbtxt.needs_our_model(config.export)],
        f"{config.model_name}/{EMBEDDED}": scores[True],
        f"{config.model_name}_text/config.pbtxt": config_pbtxt.text_config(entry),
    }


def check_config_files(repository: Path, expected: Mapping[str, config_pbtxt.ModelConfig]) -> list[Check]:
    """One row per file of a model repository."""
    checks = []
    for name, wanted in expected.items():
        try:
            found = config_pbtxt.parse((repository / name).read_text())
            differing = _differences(_facts(wanted), _facts(found))
        except (OSError, ValueError, config_pbtxt.ParseError) as error:
            differing = [str(error).splitlines()[0]]
        checks.append(_row(name, differing))
    return checks


def check_served_configs(
    endpoint: Endpoint, version: str, expected: Mapping[str, config_pbtxt.ModelConfig]
) -> list[Check]:
    """One row per model: what the server says it runs."""
    checks = []
    with tritonclient.grpc.InferenceServerClient(endpoint.grpc) as client:
        for model in dict.fromkeys(name.partition("/")[0] for name in expected):
            found = client.get_model_config(model, version, client_timeout=TIMEOUT_S).config
            wanted = [one for name, one in expected.items() if name.startswith(f"{model}/")]
            same_backend = [one for one in wanted if one.backend == found.backend] or wanted
            checks.append(_row(f"{model} on the server", _differences(_facts(same_backend[0]), _facts(found))))
    return checks


def served_backend(endpoint: Endpoint, model: str, version: str) -> str:
    """Name of the backend that runs a model."""
    with tritonclient.grpc.InferenceServerClient(endpoint.grpc) as client:
        return str(client.get_model_config(model, version, client_timeout=TIMEOUT_S).config.backend)


def _row(name: str, differing: list[str]) -> Check:
    details = {"config": name, **({"failure": "; ".join(differing)} if differing else {})}
    return Check("config", not differing, details=details)


def _facts(config: config_pbtxt.ModelConfig) -> dict[str, Any]:
    """What decides answers, by name."""
    return {
        **config_pbtxt.signature(config),
        "name": config.name,
        "backend": config.backend,
        "max_batch_size": config.max_batch_size,
        "decoupled": config.model_transaction_policy.decoupled,
    }


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    names = sorted(wanted.keys() | found.keys())
    return [
        f"{name} is {found.get(name)}, not {wanted.get(name)}" for name in names if wanted.get(name) != found.get(name)
    ]
