"""What a server loads of a model repository: a directory of links to the versions that it should serve, and no others.

Clients of the inference server that name no version get the highest number that is loaded. So the aliases reach every
client, over HTTP and gRPC, without a word of its own in the request: the server is pointed not at the repository but at
a view of it, in which the live version has the highest number, and a rollback takes the link of a higher one away. That
copies nothing, and the version to go back to is usually loaded already. The version under canary is the highest number
of a second view, served by a server of its own, to which the proxy sends its share. A client that names one in its
request gets that one as long as it is loaded: the live one, and `publish.keep_versions` - 1 that were live before.
A view can also hold one version alone, whatever the aliases say, for who works on that one.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from flows.serving.releases.state import Aliases, once_live, read_aliases
from flows.serving.repository import CONFIG, VERSION_CONFIG, model_names, published_names


class Pool(StrEnum):
    """Servers that serve the same versions."""

    live = "live"
    candidate = "candidate"


class ServedView:
    """The links of one pool.

    Args:
        repository: Model repository.
        directory: Where the links are kept; made if it is not there.
        pool: Whether versions under canary are the ones that answer.
        only: Published name and version to serve, and nothing else; None = what the aliases say.
    """

    def __init__(
        self, repository: Path, directory: Path, pool: Pool = Pool.live, only: tuple[str, int] | None = None
    ) -> None:
        self.path = directory
        self._repository = repository.absolute()
        self._pool = pool
        self._only = only

    def refresh(self) -> dict[str, str]:
        """Makes the links what the aliases say; the caller holds the repository's lock.

        Returns:
            What decides how each model is served, by model name, scores before text.
        """
        names = [name for name in published_names(self._repository) if self._versions(name)]
        for name in names:
            for model in model_names(name):
                self._link(model, self._versions(name))
        for path in self.path.glob("*"):
            if path.name not in [model for name in names for model in model_names(name)]:
                self._clear(path, keep=set())
                path.rmdir()
        return self.state()

    def state(self) -> dict[str, str]:
        """What decides how each model is served, by model name, as the links are."""
        found = {}
        for model in sorted(path for path in self.path.glob("*") if path.is_dir()):
            found[model.name] = repr([f"{path.name} -> {path.readlink()}" for path in sorted(model.iterdir())])
        return found

    def _versions(self, model_name: str) -> list[int]:
        if self._only is not None:
            return [self._only[1]] if model_name == self._only[0] else []
        top = _answering(read_aliases(self._repository, model_name), self._pool)
        if top is None:
            return []
        return [*sorted(version for version in once_live(self._repository, model_name) if version < top), top]

    def _link(self, model: str, versions: list[int]) -> None:
        source, place = self._repository / model, self.path / model
        place.mkdir(parents=True, exist_ok=True)
        config = source / str(versions[-1]) / VERSION_CONFIG
        beside = config if config.is_dir() else source  # a version of before the configuration was kept with it
        wanted = {path.name: path for path in beside.iterdir() if path.name in (CONFIG, "configs", "warmup")}
        wanted |= {str(version): source / str(version) for version in versions}
        self._clear(place, keep={name for name, target in wanted.items() if _points_to(place / name, target)})
        for name, target in wanted.items():
            if not (place / name).is_symlink():
                (place / name).symlink_to(target)

    def _clear(self, place: Path, keep: set[str]) -> None:
        for path in place.iterdir():
            if path.name not in keep:
                path.unlink()


def _answering(aliases: Aliases, pool: Pool) -> int | None:
    return aliases.candidate if pool is Pool.candidate and aliases.share else aliases.live


def _points_to(link: Path, target: Path) -> bool:
    return link.is_symlink() and link.readlink() == target
