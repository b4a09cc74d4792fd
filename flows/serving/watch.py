"""Keeps a running inference server on the newest complete versions of its repository."""

from __future__ import annotations

import logging
from pathlib import Path

from flows.config import ConfigError
from flows.serving.entry import FILES
from flows.serving.installation import ServerError
from flows.serving.publish import CONFIG, lock_repository
from flows.serving.server import InferenceServer

logger = logging.getLogger(__name__)


def find_models(repository: Path) -> list[str]:
    """Names of the models in a repository, each before the models that call it.

    Raises:
        ConfigError: There are none.
    """
    models = sorted(path.parent.name for path in repository.glob(f"[!.]*/{CONFIG}"))  # <name> sorts before <name>_text
    if not models:
        raise ConfigError(
            f"publish.model_repo={repository} holds no published model. Make one with: python -m flows.train "
            "+experiment=quickstart"
        )
    return models


class RepositoryWatcher:
    """Loads what has been published since the last look.

    Args:
        server: The running server.
        repository: Its model repository.
        loaded: State of each model when the server started, from `repository_state`.
    """

    def __init__(self, server: InferenceServer, repository: Path, loaded: dict[str, str]) -> None:
        self._server = server
        self._repository = repository
        self._loaded = loaded

    def look(self) -> list[str]:
        """Loads models that are new or have changed; versions that are served stay until the new ones are ready.

        A version that the server refuses is reported once, in the log, and the version before it stays.

        Returns:
            Names of the models that were loaded.
        """
        with lock_repository(self._repository, wait=False) as locked:
            if not locked:  # somebody is publishing; the next look will find it complete
                return []
            state = repository_state(self._repository)
            changed = [name for name in state if state[name] != self._loaded.get(name)]
            return [name for name in changed if self._load(name, state[name])]

    def _load(self, model: str, state: str) -> bool:
        self._loaded[model] = state
        try:
            self._server.load(model)
        except ServerError as error:
            logger.error("%s What was served before still is.", error)
            return False
        logger.info("%s: versions %s are served", model, self._server.ready_versions(model))
        return True


def repository_state(repository: Path) -> dict[str, str]:
    """What decides which versions of each model are served, and how, by model name, in the order to load them."""
    state = {}
    for name in find_models(repository):
        versions = [(path.parent.name, path.read_text()) for path in (repository / name).glob(f"*/{FILES}")]
        configs = [path.read_text() for path in (repository / name).rglob("*.pbtxt")]
        state[name] = repr((sorted(versions), sorted(configs)))
    return state
