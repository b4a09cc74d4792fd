"""Writes what runs the live versions in containers: a compose file and Kubernetes manifests for the official image.

    python -m flows.manifests                                  of publish.model_repo, reachable from this machine only
    python -m flows.manifests manifests.image=registry.example.com/millrace-server:1 manifests.replicas=3

Into `artifacts_dir/manifests`: model_repository (the live versions, each checked against its passport), image (what
the container is built from: the official image with onnxruntime), compose.yaml and kubernetes.yaml. The files are
checked against their schemas; no container has been run with them here. After a promotion, write and apply them again.

    python -m flows.manifests manifests.vllm=true              vllm_repository, too

holds the live versions' checkpoints for the vLLM backend (of an official image <release>-vllm-python-py3, which finds
it at /models). Nothing has proven what that answers, and nothing here serves or releases it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.compose import run_cli
from flows.config import Config
from flows.serving.manifests import compose_file, kubernetes
from flows.serving.manifests.container import MODELS_DIR, NOT_RUN, write_image, write_live
from flows.serving.releases.state import check_proven, live_versions
from flows.serving.releases.watch import check_published
from flows.serving.repository import PASSPORT


def manifests(config: Config) -> None:
    """Writes the directory and says what to do with it.

    Raises:
        ConfigError: The repository is empty, or vLLM does not load a live version's checkpoint.
        PassportError: `manifests.vllm`, and the artifact store lacks what a live version was made from.
        ReleaseError: A live version is not what its passport proves.
    """
    check_published(config.publish.model_repo)
    directory = config.artifacts_dir / "manifests"
    directory.mkdir(parents=True, exist_ok=True)
    if config.manifests.vllm:
        _write_vllm(config, directory / "vllm_repository")
    served = write_live(config.publish.model_repo, directory / "model_repository")
    write_image(config.manifests, served, directory / "image")
    compose = compose_file.compose_file(config.manifests, config.serve, served)
    _write(directory / "compose.yaml", compose_file.SCHEMA, [compose])
    objects = kubernetes.manifests(config.manifests, config.serve, served)
    _write(directory / "kubernetes.yaml", kubernetes.SCHEMA, objects)
    for name, version in served.versions.items():
        print(f"{name}: {version}")
    print(f"{directory}: compose.yaml, kubernetes.yaml, image, model_repository. Not run here:")
    print(f"docker compose -f {directory / 'compose.yaml'} up --build")
    print(
        f"docker build -t {config.manifests.image} {directory / 'image'}, push it, copy model_repository into the "
        f"volume of {config.manifests.volume_claim}, then kubectl apply -f {directory / 'kubernetes.yaml'}"
    )


def _write_vllm(config: Config, target: Path) -> None:
    from flows.serving.manifests import vllm_model  # imports torch
    from flows.serving.proof.reverify import read_proven

    repository = config.publish.model_repo
    shutil.rmtree(target, ignore_errors=True)
    for name, version in live_versions(repository).items():
        check_proven(repository, name, version)
        proven = read_proven(repository, name, version, config.artifacts_dir / "store")
        made = vllm_model.build(target, name, version, proven.config, proven.parents["model"], MODELS_DIR)
        print(f"{made}: {vllm_model.VERDICT}, see its {PASSPORT}")


def _write(path: Path, schema: str, documents: Sequence[Mapping[str, Any]]) -> None:
    yaml = YAML()
    yaml.width = 1000
    yaml.representer.ignore_aliases = lambda *_: True  # a manifest is read by people
    with path.open("w") as file:
        file.write(f"# {NOT_RUN.format(checked=f'valid by {schema}')}\n")
        yaml.dump_all(documents, file)


if __name__ == "__main__":
    run_cli(manifests, __doc__)
