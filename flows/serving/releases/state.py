"""Which version of a model is what: `live`, `previous` and `candidate`, with the history of how they came to be.

`model_repo/<name>/releases.jsonl` holds one line for every change, newest last: when, who, what, why, the digest of the
version's passport, and the aliases from then on. The newest line is the state; nothing is derived from the others but
which versions were live before. The file is replaced as a whole, so that a reader never meets half a line.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flows.artifact import digest_file, digest_json, flush_to_disk
from flows.config import RunError
from flows.serving.entry import version_digests
from flows.serving.repository import PASSPORT, VERSION_CONFIG, complete_versions, model_names, published_names

HISTORY = "releases.jsonl"


class ReleaseError(RunError):
    """A version cannot be released as asked; nothing was changed."""

    exit_code = 2


@dataclass(frozen=True)
class Aliases:
    """What the versions of a model are."""

    live: int | None
    """Answers requests that name no version."""
    previous: int | None = None
    """Was live before; `rollback` goes back to it."""
    candidate: int | None = None
    """Published or chosen to become live, and not yet."""
    share: float = 0.0
    """Share of requests that the candidate answers in place of the live version."""


def read_history(repository: Path, model_name: str) -> list[dict[str, Any]]:
    """All changes, oldest first; none for a model that was published without a history.

    Raises:
        ReleaseError: A line of the history is not JSON, or says nothing of aliases.
    """
    try:
        lines = (repository / model_name / HISTORY).read_text().splitlines()
        history: list[dict[str, Any]] = [json.loads(line) for line in lines]
        for event in history:
            Aliases(**{name: event[name] for name in asdict(Aliases(None))})
        return history
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        path = repository / model_name / HISTORY
        raise ReleaseError(f"{path} has a line that is no change: {error!r}. Mend or remove that line.") from error


def read_aliases(repository: Path, model_name: str) -> Aliases:
    """The aliases as they are; without a history, the newest version is live and the one before it previous."""
    if history := read_history(repository, model_name):
        return Aliases(**{name: history[-1][name] for name in asdict(Aliases(None))})
    newest = [*complete_versions(repository, model_name)[:-3:-1], None, None]
    return Aliases(live=newest[0], previous=newest[1])


def live_versions(repository: Path) -> dict[str, int]:
    """Of each published model that has one."""
    found = {name: read_aliases(repository, name).live for name in published_names(repository)}
    return {name: version for name, version in found.items() if version is not None}


def once_live(repository: Path, model_name: str) -> list[int]:
    """Versions that are or were live and are still there, the one that became so first last."""
    complete = complete_versions(repository, model_name)
    history = read_history(repository, model_name)
    if not history:
        return complete[::-1]
    found = dict.fromkeys(event[alias] for event in history for alias in ("previous", "live"))
    return [version for version in reversed(found) if version in complete]


def is_recorded(repository: Path, model_name: str, version: int) -> bool:
    """Whether the history says that a version was published."""
    return _published(repository, model_name, version) is not None


def record_published(repository: Path, model_name: str, version: int, *, live: bool) -> None:
    """Notes a version that was put into the repository, as live or as the candidate; the caller holds the lock.

    A version that is known already keeps what was decided about it: it was rolled back, say, and is published again by
    a run that changed nothing. Only a candidate that waits becomes live so.
    """
    aliases = read_aliases(repository, model_name)
    if read_history(repository, model_name):
        if is_recorded(repository, model_name, version) and not (live and aliases.candidate == version):
            return
    else:
        before = [other for other in complete_versions(repository, model_name) if other != version]
        aliases = Aliases(live=before[-1] if before else None, previous=before[-2] if before[1:] else None)
    if live or aliases.live is None:
        after = with_live(aliases, version)
    else:
        after = replace(aliases, candidate=version, share=0.0)
    record(repository, model_name, "publish", version, after)


def with_live(aliases: Aliases, version: int) -> Aliases:
    """The aliases once a version is live; whatever was a candidate, or is compared with one, is none any more."""
    previous = aliases.live if aliases.live != version else aliases.previous
    return Aliases(live=version, previous=previous)


def record(
    repository: Path, model_name: str, verb: str, version: int | None, after: Aliases, *, why: str = "", who: str = ""
) -> None:
    """Adds a line to the history, on disk when it returns; the caller holds the lock.

    Args:
        repository: Model repository.
        model_name: Published name.
        verb: What was done.
        version: The version that it was done to.
        after: The aliases from now on.
        why: In the words of whoever did it.
        who: Empty = the user of this process.
    """
    proof: Mapping[str, str] = {}
    if version is not None and (repository / model_name / str(version) / PASSPORT).is_file():
        digest = digest_file(repository / model_name / str(version) / PASSPORT)
        on_disk = files_on_disk(repository, model_name, version)
        proof = {"passport": digest, "content": content_digest(repository, version, on_disk)}
    event = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "who": who or _user(),
        "verb": verb,
        "version": version,
        **asdict(after),
        **proof,
        "why": why,
    }
    path = repository / model_name / HISTORY
    before = path.read_bytes() if path.exists() else b""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            file.write(before + json.dumps(event).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise ReleaseError(f"{path} cannot be written: {error.strerror}. Nothing was changed; try again.") from error


def files_on_disk(repository: Path, model_name: str, version: int) -> dict[str, dict[str, str]]:
    """sha256 by file name of each of a version's two models; reads all of the weights."""
    return {name: version_digests(repository / name / str(version)) for name in model_names(model_name)}


def content_digest(repository: Path, version: int, on_disk: Mapping[str, Mapping[str, str]]) -> str:
    """sha256 over all that a server loads of a version: both models, and how they were configured with it."""
    files: dict[str, str] = {}
    for name, digests in on_disk.items():
        place = repository / name / str(version)
        files |= {f"{name}/{file}": digest for file, digest in digests.items()}
        for path in sorted((place / VERSION_CONFIG).rglob("*")):
            if path.is_file():
                files[f"{name}/{path.relative_to(place)}"] = digest_file(path)
    return digest_json(files)


def check_proven(repository: Path, model_name: str, version: int) -> None:
    """Raises `ReleaseError` unless the version is there and its files are those that its passport proves."""
    place = repository / model_name / str(version)
    if version not in (complete := complete_versions(repository, model_name)):
        raise ReleaseError(f"{model_name} has no version {version} in {repository}; there are {complete or 'none'}.")
    try:
        passport = json.loads((place / PASSPORT).read_text())
        verdict, proven = passport["verdict"], passport["digests"]["served_files"]
    except (OSError, ValueError, KeyError) as error:
        raise ReleaseError(
            f"{place / PASSPORT} cannot be read: {error}. Publish the version again with python -m flows.train."
        ) from error
    if verdict != "passed":
        raise ReleaseError(f"{place / PASSPORT} says {verdict!r}, not 'passed'. This version is not released.")
    on_disk = files_on_disk(repository, model_name, version)
    for name, found in on_disk.items():
        for file, digest in proven[name].items():
            if found.get(file) != digest:
                raise ReleaseError(
                    f"{repository / name / str(version) / file} has sha256 {found.get(file, 'missing')[:12]}, not "
                    f"{digest[:12]} as its passport says. Publish the version again; it is not released."
                )
    event = _published(repository, model_name, version)
    if event and (
        event["passport"] != digest_file(place / PASSPORT)
        or event["content"] != content_digest(repository, version, on_disk)
    ):
        raise ReleaseError(
            f"{place} has changed since it was published at {event['at']} (its passport, its configuration, or "
            "files.json). Publish the version again; it is not released."
        )


def _published(repository: Path, model_name: str, version: int) -> dict[str, Any] | None:
    events = [event for event in read_history(repository, model_name) if event["version"] == version]
    return next((event for event in reversed(events) if event["verb"] == "publish"), None)


def _user() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
