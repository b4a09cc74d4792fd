"""Stage `publish`: a verified entry becomes the next version in the model repository that the inference server loads.

Both models of an entry get the same number. Each version directory is copied aside, flushed and renamed: scores first,
because the text model asks the scores of its own version; then what the server reads first, `config.pbtxt`, last. A
version counts once both directories are there. A publisher that is killed at any moment leaves the versions before it
served, and the next one sweeps up. A server that watches holds the same lock while it loads. Which of the versions are
served is written last (`flows.serving.releases.state`): at once this one, or the one before until `flows.promote` says
so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.artifact import Artifact, digest_file, flush_to_disk, write_json_atomically
from flows.config import ConfigError, RunError
from flows.config.serving import PublishConfig
from flows.serving.entry import REPOSITORY, STAGED_VERSION, version_digests
from flows.serving.releases.state import is_recorded, record_published
from flows.serving.repository import (
    CONFIG,
    PASSPORT,
    TEXT_SUFFIX,
    VERSION_CONFIG,
    complete_versions,
    lock_repository,
    model_names,
    version_dirs,
)

RECORD = "published.json"


class PublishError(RunError):
    """A version cannot be put into the model repository."""


def build(directory: Path, config: PublishConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Publishes `parents["entry"]`; does nothing if the newest version already holds exactly its files.

    Writes `published.json`: where the version is and the sha256 of its files.

    Args:
        directory: Where the record goes.
        config: Name and place.
        parents: `entry`, its `passport`, and the `gates` that it had to pass.

    Raises:
        ConfigError: A model of that name with other inputs or outputs is there.
        PublishError: The passport is not about this entry, or its verdict is not `passed`.
    """
    staged = parents["entry"].path / REPOSITORY
    _check_passport(parents["passport"].path / PASSPORT, parents["entry"])
    config.model_repo.mkdir(parents=True, exist_ok=True)
    with lock_repository(config.model_repo):
        for name in model_names(config.model_name):
            _check_signature(staged / name, config.model_repo / name)
            _sweep(config.model_repo / name)
        version, is_new = _place(staged, parents["passport"].path / PASSPORT, config)
        for name in model_names(config.model_name):
            _write_settings(staged / name, config.model_repo / name)
        record_published(config.model_repo, config.model_name, version, live=config.live)
    places = [config.model_repo / name / str(version) for name in model_names(config.model_name)]
    digests = {f"{place.parent.name}/{version}": version_digests(place) for place in places}
    digests[f"{config.model_name}/{version}"][PASSPORT] = digest_file(places[0] / PASSPORT)
    for name in model_names(config.model_name):
        settings = _settings(staged / name)
        digests[name] = {str(path): digest_file(config.model_repo / name / path) for path in settings}
    record = {"model_repo": str(config.model_repo), "model_name": config.model_name, "version": version}
    write_json_atomically(directory / RECORD, {**record, "files": digests})
    return {**record, "is_new": is_new, "paths": [str(place) for place in places]}


def is_current(artifact: Artifact) -> bool:
    """Whether what the artifact records is still the newest version and none of its files has changed."""
    record = json.loads((artifact.path / RECORD).read_text())
    repository = Path(record["model_repo"])
    if complete_versions(repository, record["model_name"])[-1:] != [record["version"]]:
        return False
    if not is_recorded(repository, record["model_name"], record["version"]):  # its publisher was killed before that
        return False
    return all(
        (repository / place / name).is_file() and digest_file(repository / place / name) == digest
        for place, files in record["files"].items()
        for name, digest in files.items()
    )


def _check_passport(path: Path, entry: Artifact) -> None:
    passport = json.loads(path.read_text())
    if passport["verdict"] != "passed" or passport["digests"]["entry"] != entry.digest:
        raise PublishError(f"{path} does not say that this entry passed. Verify it again; nothing was published.")


def _check_signature(staged: Path, published: Path) -> None:
    """Clients of the name must not meet other inputs or outputs."""
    from flows.serving.config_pbtxt import ParseError, parse, signature

    try:
        old = signature(parse((published / CONFIG).read_text()))
    except (FileNotFoundError, ParseError):  # the first version, or a damaged file, which is written anew
        return
    new = signature(parse((staged / CONFIG).read_text()))
    if old != new:
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        name = staged.name.removesuffix(TEXT_SUFFIX)
        raise ConfigError(
            f"publish.model_name={name} is taken in publish.model_repo={published.parent} by a model that differs in "
            f"{', '.join(changed)}: its clients would break. Set another publish.model_name."
        )


def _sweep(model_dir: Path) -> None:
    """Removes what a killed publisher left aside."""
    for path in model_dir.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _place(staged: Path, passport: Path, config: PublishConfig) -> tuple[int, bool]:
    """The number under which the entry's files are the newest version, and whether they had to be copied."""
    names = model_names(config.model_name)
    complete = complete_versions(config.model_repo, config.model_name)
    for name in names:  # of a publisher that was killed between its two renames
        for path in version_dirs(config.model_repo / name):
            if int(path.name) > max(complete, default=0):
                shutil.rmtree(path)
    newest = max(complete, default=0)
    if complete and all(_is_same(staged / name, config.model_repo / name / str(newest)) for name in names):
        return newest, False
    version = newest + 1
    asides = []
    for name in names:
        aside = config.model_repo / name / f".{version}.partial"
        shutil.copytree(staged / name / STAGED_VERSION, aside)
        for path in _settings(staged / name):
            (aside / VERSION_CONFIG / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(staged / name / path, aside / VERSION_CONFIG / path)
        asides.append(aside)
    shutil.copyfile(passport, asides[0] / PASSPORT)
    for aside in asides:
        for path in (*aside.rglob("*"), aside):
            flush_to_disk(path)
    for aside in asides:
        aside.rename(aside.with_name(str(version)))
        flush_to_disk(aside.parent)
    return version, True


def _is_same(staged: Path, published: Path) -> bool:
    wanted, found = version_digests(staged / STAGED_VERSION), version_digests(published)
    return wanted == found and (published.parent.name.endswith(TEXT_SUFFIX) or (published / PASSPORT).is_file())


def _write_settings(staged: Path, published: Path) -> None:
    """Replaces what belongs to all versions, each file at once, what the server reads first last."""
    for path in _settings(staged):
        target = published / path
        if target.exists() and target.read_bytes() == (staged / path).read_bytes():
            continue
        target.parent.mkdir(exist_ok=True)
        aside = published / f".{path.name}.partial"
        shutil.copyfile(staged / path, aside)
        flush_to_disk(aside)
        aside.replace(target)
        flush_to_disk(target.parent)


def _settings(staged: Path) -> list[Path]:
    """Files of a staged model that belong to all versions, config.pbtxt last."""
    files = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
    files = [path for path in files if path.parts[0] != STAGED_VERSION]
    return sorted(files, key=lambda path: (path.name == CONFIG, str(path)))
