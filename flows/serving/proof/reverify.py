"""Proves again, at any time, that a published version is the trained model: from data to what a server answers.

Nothing in the version is believed: what it was made from is found in the artifact store by digest, every byte of it is
compared with its manifest, and new inputs are asked of the server.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.artifact import MANIFEST, Artifact, ArtifactError, digest_file, load_artifact, read_manifest
from flows.config import from_plain
from flows.config.checks import require
from flows.config.serving import MODEL_NAME, PassportConfig
from flows.export.runtime import PROGRAM
from flows.serving.client import Transport
from flows.serving.endpoint import Endpoint
from flows.serving.entry import FILES, REPOSITORY, program_files
from flows.serving.installation import ServerError
from flows.serving.proof.config_check import check_config_files, expected_configs
from flows.serving.proof.passport import (
    PROVEN_FROM,
    Expected,
    PassportError,
    check_digests,
    check_server,
    describe,
    expect,
    read_passport,
    staged_files,
    state,
)
from flows.serving.proof.scores_check import Check
from flows.serving.repository import PASSPORT, link_or_copy, model_names
from flows.serving.server import InferenceServer

DATA = "corpus"
"""What the name of a stage begins with that reads raw data: there the way back from what is served ends."""


@dataclass(frozen=True)
class Verification:
    """What a second look at a version found."""

    passport: Mapping[str, Any]
    """Like the version's own `passport.json`, made now."""
    failed: Sequence[Check]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return not self.failed

    def lines(self) -> list[str]:
        """For a person: how many checks of each name passed, what was left out and why, and what failed."""
        rows = self.passport["rows"]
        counted = {
            name: [row for row in rows if row["name"] == name] for name in dict.fromkeys(r["name"] for r in rows)
        }
        lines = []
        for name, mine in counted.items():
            worst = [row["worst_difference"] for row in mine if "worst_difference" in row]
            allowed = [row["tolerance"] for row in mine if "worst_difference" in row]
            numbers = f"  worst difference {max(worst):.3g}, tolerance {max(allowed):.3g}" if worst else ""
            lines.append(f"{name:<24} {sum(row['passed'] for row in mine)} of {len(mine)} passed{numbers}")
        lines += [f"{name:<24} left out: {reason}" for name, reason in self.passport["skipped"].items()]
        return lines + describe(self.failed)


def verify_version(
    repository: Path,
    model_name: str,
    version: int,
    store: Path,
    *,
    endpoint: Endpoint | None = None,
    log_path: Path | None = None,
) -> Verification:
    """Runs every check of the passport again, on inputs made now, and those of the way from data to the files on disk.

    Args:
        repository: Model repository.
        model_name: Name of the scores model; its text model is verified with it.
        version: Number of the version.
        store: Artifact store (`<artifacts_dir>/store`) of the run that published it.
        endpoint: A running server that serves the version; None starts a private one on a copy of it.
        log_path: Where a private server's log goes; None throws it away.

    Raises:
        ConfigError: There is no such version.
        PassportError: The version has no passport that can be read, or the store lacks what it was made from.
        ServerError: The running server does not answer, or does not serve the version.
    """
    started = time.monotonic()
    proven = read_proven(repository, model_name, version, store)
    checks = check_files(proven)
    expected = proven.expect()
    # of the entry, not of the version: a listing that was replaced must not vouch for itself
    listings = {name: files[FILES] for name, files in staged_files(proven.parents["entry"], expected.models).items()}
    skipped: Mapping[str, str] = {}
    server_version = "that did not start"
    with ExitStack() as running:
        if endpoint is None:
            scratch = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="millrace-verify-")))
            copied = copy_version(repository, expected.models, version, scratch / REPOSITORY)
            private = InferenceServer(copied, expected.models, log_path or scratch / "server.log")
            try:
                endpoint = running.enter_context(private).endpoint
                checks.append(Check("loads", True))
            except ServerError as error:
                checks.append(Check("loads", False, details={"failure": str(error)}))
        else:
            _check_serves(endpoint, expected.models, version)
        if endpoint is not None:
            with endpoint.connect(Transport.http) as client:
                server_version = client.server_version()
            found, skipped = check_server(endpoint, str(version), expected, listings)
            checks += found
    passport, _ = state(expected, proven.parents, checks, skipped, server_version, started)
    return Verification(passport | {"version": version}, [check for check in checks if not check.passed])


@dataclass(frozen=True)
class Proven:
    """A version, and what its passport says that it was made from."""

    repository: Path
    version: int
    store: Path
    config: PassportConfig
    parents: Mapping[str, Artifact]

    def expect(self) -> Expected:
        """What a server has to answer that serves it."""
        return expect(self.config, self.parents)


def read_proven(repository: Path, model_name: str, version: int, store: Path) -> Proven:
    """A published version with the artifacts that it was made from, found by digest and verified.

    Raises:
        ConfigError: There is no such version.
        PassportError: See `verify_version`.
    """
    stated = read_passport(version_place(repository, model_name, version))
    config = from_plain(PassportConfig, stated["config"])
    require(
        config.model_name == model_name,
        "version",
        f"{model_name}/{version}",
        f"carries the passport of {config.model_name}",
        "Publish the model again.",
    )
    return Proven(repository, version, store, config, _find_parents(store, stated))


def check_files(proven: Proven) -> list[Check]:
    """The checks of a version that need no server: the way from raw data to the files on disk. Takes a second."""
    name, parents = proven.config.model_name, proven.parents
    models = model_names(name)
    stated = staged_files(parents["entry"], models)
    program = program_files(parents["program"].path / PROGRAM, proven.config.export.pipeline_stages)
    return [
        _check_passport(proven.store, proven.repository / name / str(proven.version) / PASSPORT),
        _check_lineage(proven.store, parents),
        check_digests(proven.repository, str(proven.version), models, parents, stated),
        *check_config_files(proven.repository, expected_configs(proven.config, program)),
    ]


def version_place(repository: Path, model_name: str, version: int) -> Path:
    """Directory of a version's scores model; neither name nor number can lead out of the repository.

    Raises:
        ConfigError: There is no such version.
    """
    is_name = re.fullmatch(MODEL_NAME, model_name) is not None
    place = repository / model_name / str(version)
    both = [repository / name / str(version) for name in model_names(model_name)]
    complete = is_name and version > 0 and all(one.is_dir() for one in both)
    require(complete, "version", f"{model_name}/{version}", f"is not in {repository}", "Name one that was published.")
    return place


def copy_version(repository: Path, models: Sequence[str], version: int, target: Path) -> Path:
    """A repository of its own for one version, by hard links where the file system has them; returns it."""
    others = {str(path.name) for name in models for path in (repository / name).glob("[0-9]*")} - {str(version)}
    for name in models:
        ignore = shutil.ignore_patterns(*others, ".*", "__pycache__")
        shutil.copytree(repository / name, target / name, ignore=ignore, copy_function=link_or_copy)
    return target


def _check_serves(endpoint: Endpoint, models: Sequence[str], version: int) -> None:
    for model in models:
        with endpoint.connect(Transport.grpc) as client:
            if not client.is_ready(model, str(version)):
                raise ServerError(f"The server at {endpoint.grpc} does not serve version {version} of {model}.")


def _find_parents(store: Path, stated: Mapping[str, Any]) -> dict[str, Artifact]:
    """The artifacts that a passport names, found by digest and verified."""
    by_digest = {manifest["digest"]: path for path, manifest in _manifests(store)}
    found, problems = {}, []
    for role in PROVEN_FROM:
        digest = stated["digests"][role]
        if digest not in by_digest:
            problems.append(f"{role} {digest[:12]} is not there")
            continue
        try:
            found[role] = load_artifact(by_digest[digest])
        except ArtifactError as error:
            problems.append(f"{role}: {error}")
    if problems:
        raise PassportError(
            f"{store} does not hold what the version was made from: {'; '.join(problems)}. Name the store of the run "
            "that published it, or train again."
        )
    return found


def _manifests(store: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for path in sorted(store.glob(f"*/{MANIFEST}")):
        try:
            found.append((path.parent, read_manifest(path.parent)))
        except (ArtifactError, FileNotFoundError):
            continue
    return found


def _check_passport(store: Path, passport: Path) -> Check:
    """The version's passport is, byte for byte, one that a run has made."""
    digest = digest_file(passport)
    made = any(manifest["files"].get(PASSPORT) == digest for _, manifest in _manifests(store))
    failure = {} if made else {"failure": f"{passport} was not made by any run of {store}"}
    return Check("passport", made, details=failure)


def _check_lineage(store: Path, parents: Mapping[str, Artifact]) -> Check:
    """Recorded parents lead from the entry over program and checkpoint to tokens, tokenizer and raw data."""
    seen: dict[str, str] = {}
    missing = []
    waiting = {parents["entry"].key: parents["entry"].digest}
    while waiting:
        key, digest = waiting.popitem()
        try:
            manifest = read_manifest(store / key)
        except (ArtifactError, FileNotFoundError):
            manifest = {}
        if manifest.get("digest") != digest:
            missing.append(key)
            continue
        seen[digest] = manifest["stage"]
        recorded = {parent["key"]: parent["digest"] for parent in manifest["parents"].values()}
        waiting |= {key: digest for key, digest in recorded.items() if digest not in seen}
    missing += [f"{role} {one.digest[:12]}" for role, one in parents.items() if one.digest not in seen]
    failure = None
    if missing:
        failure = f"{', '.join(missing)} is not among what the entry was made from"
    elif not any(stage.startswith(DATA) for stage in seen.values()):
        failure = "the way back does not end in raw data"
    details = {"artifacts": len(seen), **({"failure": failure} if failure else {})}
    return Check("lineage", failure is None, details=details)
