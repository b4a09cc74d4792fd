"""Keeps a running inference server on the versions that its view of the repository says."""

from __future__ import annotations

import logging
from pathlib import Path

from flows.config import ConfigError
from flows.serving.installation import ServerError
from flows.serving.releases.served_view import ServedView
from flows.serving.releases.state import live_versions, read_aliases
from flows.serving.repository import complete_versions, lock_repository, published_names
from flows.serving.server import InferenceServer

logger = logging.getLogger(__name__)


def check_published(repository: Path) -> None:
    """Raises `ConfigError` if a repository holds no published model, or lacks a version that is live."""
    if not published_names(repository):
        raise ConfigError(
            f"publish.model_repo={repository} holds no published model. Make one with: python -m flows.train "
            "+experiment=quickstart"
        )
    for name, version in live_versions(repository).items():
        if version not in (there := complete_versions(repository, name)):
            raise ConfigError(
                f"publish.model_repo={repository} lacks version {version} of {name}, which is live, or half of it; it "
                f"has {there}. Put it back, or serve another one: python -m flows.promote promote {name} --version "
                f"{there[-1]} --repository {repository}."
            )


class RepositoryWatcher:
    """Loads what has been published or promoted since the last look.

    Args:
        server: The running server.
        repository: The model repository.
        view: What the server serves of it.
        loaded: State of each model when the server started, from the view.
    """

    def __init__(self, server: InferenceServer, repository: Path, view: ServedView, loaded: dict[str, str]) -> None:
        self._server = server
        self._repository = repository
        self._view = view
        self._loaded = loaded
        self._told: set[tuple[str, int | None]] = set()

    def look(self) -> list[str]:
        """Loads models that are new or have changed; versions that are served stay until the new ones are ready.

        A version that the server refuses is reported once, in the log, and the version before it stays.

        Returns:
            Names of the models that were loaded.
        """
        with lock_repository(self._repository, wait=False) as locked:
            if not locked:  # somebody is publishing; the next look will find it complete
                return []
            state = self._view.refresh()
            self._tell_of_canaries()
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

    def _tell_of_canaries(self) -> None:
        for name in published_names(self._repository):
            aliases = read_aliases(self._repository, name)
            if aliases.share and (name, aliases.candidate) not in self._told:
                self._told.add((name, aliases.candidate))
                logger.error(
                    "%s version %s is under canary, and serve.replicas=0 has no proxy that could split requests: the "
                    "live version answers all of them. Start again with serve.replicas=1 or more.",
                    name,
                    aliases.candidate,
                )
