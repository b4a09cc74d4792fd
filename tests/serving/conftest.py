from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flows.artifact import Artifact
from flows.config.serving import PublishConfig
from flows.serving import publish
from flows.serving.releases.state import record_published
from flows.serving.repository import PASSPORT, lock_repository
from flows.serving.server import InferenceServer
from tests.serving.tiny_chain import (
    ENTRY,
    EXPORT,
    NAME,
    Chain,
    Published,
    build_chain,
    build_entry,
    make_passport,
    publish_chain,
)
from tests.serving.tiny_model import artifact


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> Iterator[None]:
    """Threads only get into each other's way in a model this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return build_chain(tmp_path_factory.mktemp("chain"), seed=0)


@pytest.fixture(scope="session")
def other_chain(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The same model served with another setting: another version, without another export."""
    root = tmp_path_factory.mktemp("other_chain")
    longer = replace(ENTRY, export=replace(EXPORT, max_new_tokens=29))
    return replace(chain, entry=build_entry(root / "entry", chain.made_from, longer))


@pytest.fixture(scope="session")
def passport(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_passport(tmp_path_factory.mktemp("passport") / "artifact", chain)


@pytest.fixture(scope="session")
def other_passport(other_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_passport(tmp_path_factory.mktemp("other_passport") / "artifact", other_chain)


@pytest.fixture(scope="session")
def published(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_chain(tmp_path_factory.mktemp("published"), chain)


@pytest.fixture
def live_repository(chain: Chain, passport: Artifact, tmp_path: Path) -> Path:
    """A model repository whose version 1 is the entry's, with its passport, and live."""
    root = tmp_path / "repo"
    shutil.copytree(chain.entry.path / "repo", root)
    shutil.copyfile(passport.path / "passport.json", root / NAME / "1" / PASSPORT)
    with lock_repository(root):
        record_published(root, NAME, 1, live=True)
    return root


@pytest.fixture
def publish_to(tmp_path: Path) -> Callable[[Path, Chain, Artifact], Artifact]:
    """Publishes into a repository and returns the stage's artifact."""
    counter = iter(range(100))

    def publish_one(repository: Path, chain: Chain, passport: Artifact) -> Artifact:
        directory = tmp_path / f"publish-{next(counter)}"
        directory.mkdir()
        config = PublishConfig(model_name=NAME, model_repo=repository)
        parents = {"entry": chain.entry, "passport": passport, "gates": chain.program}
        metrics = publish.build(directory, config, parents)
        return replace(artifact("publish", directory), metrics=metrics)

    return publish_one


@pytest.fixture(scope="session")
def server(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceServer]:
    """One server with the entry loaded, for tests that only ask."""
    root = tmp_path_factory.mktemp("server")
    shutil.copytree(chain.entry.path / "repo", root / "repo")
    with InferenceServer(root / "repo", [NAME, f"{NAME}_text"], root / "server.log") as running:
        yield running
