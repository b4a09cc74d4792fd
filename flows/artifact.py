"""Content-addressed stage outputs: what made them, and whether they are whole.

An artifact is a directory. It is written aside, `manifest.json` last, and renamed into place, so that it is either
absent or complete. Its key is a hash of everything that decides its content: the configuration section, the digests of
its parents, fingerprints of outside inputs, and the source of the code that makes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol, cast

from flows.config import RunError, to_plain

MANIFEST = "manifest.json"
OWN_DIGEST = "manifest_digest"
"""Field of a manifest that tells whether the others, metrics for instance, are as they were written."""
RECORDS_DIR = "logs"
"""Files below this directory of an artifact are checked but do not count towards its digest: logs hold times."""
PROJECT_ROOT = Path(__file__).resolve().parents[1]
OWN_PACKAGES = ("flows", "kernels")
CARRIES_ON = "; it carries on from an interrupted run"
MAKE_ROOM = "Make room, or set artifacts_dir or TMPDIR to another disk; the same command keeps all finished stages."
RECORDED_LIBRARIES = (
    "torch",
    "deepspeed",
    "tokenizers",
    "onnxruntime",
    "onnx",
    "tritonclient",
    "prefect",
    "hydra-core",
)


class ArtifactError(RunError):
    """An artifact is missing, damaged, or could not be made."""


@dataclass(frozen=True)
class Artifact:
    """A complete, verified stage output."""

    stage: str
    key: str
    digest: str
    """sha256 over the names and digests of its files; equal content has an equal digest, however it was made."""
    path: Path
    metrics: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seconds: float = field(default=0.0, compare=False)
    """Time that making it took."""


class StageModule(Protocol):
    """What a module offers to be a stage of the chain."""

    def build(self, directory: Path, config: Any, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
        """Writes the artifact's files into `directory`; returns its metrics (JSON values).

        A module that defines `resumable_as(config) -> Any` finds in `directory` what an interrupted run left there that
        had the same resumable configuration: the part of it that decides the result, but for rounding. One that defines
        `fingerprint(config) -> str` names the state of inputs from outside the store. One that defines
        `is_current(artifact) -> bool` says whether an outside effect that the artifact records still stands.
        """


@dataclass(frozen=True)
class Stage:
    """One step of the chain: a module of ours, its section of the configuration, its inputs.

    The module is imported only when the stage has to run, so that a rerun that skips everything stays fast.
    """

    name: str
    module: str
    config: Any
    parents: Mapping[str, Artifact] = field(default_factory=dict)

    @cached_property
    def ingredients(self) -> Mapping[str, Any]:
        """Everything that decides the content, as JSON values."""
        return {
            "config": _what_decides_content(self.config, to_plain(self.config)),
            "parents": {role: artifact.digest for role, artifact in self.parents.items()},
            "inputs": self._outside_fingerprint(),
            "code": source_digests(self.module),
        }

    def _outside_fingerprint(self) -> str | None:
        if "fingerprint" not in defined_names(self.module):
            return None
        return cast(str | None, importlib.import_module(self.module).fingerprint(self.config))


def _what_decides_content(section: Any, plain: Any) -> Any:
    """The plain form of a section without the fields that say where or how patiently it runs."""
    if not is_dataclass(section):
        return plain
    return {
        field.name: _what_decides_content(getattr(section, field.name), plain[field.name])
        for field in fields(section)
        if field.metadata.get("decides_content", True)
    }


def digest_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def full_disk_said(place: Path) -> Iterator[None]:
    """Turns what a full disk below `place` raises into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"{error}: it was to go to {place} or to temporary files. {MAKE_ROOM}") from error


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes aside, flushes to disk, renames into place: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)  # left over where the disk is full


def flush_to_disk(path: Path) -> None:
    """Has a file's bytes, or the names of a directory's files, on disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|.*)|import[ \t]+(.*))", re.MULTILINE)
DEFINED = re.compile(r"^(?:def[ \t]+(\w+)|(\w+)(?:[ \t]*:[^=\n]+)?[ \t]*=[^=])", re.MULTILINE)
RUN = re.compile(r"""^RUNS = ["'](.+)["']""", re.MULTILINE)


@cache
def _source(module: str) -> str:
    return _source_path(module).read_text()


def _source_path(module: str) -> Path:
    base = PROJECT_ROOT.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def defined_names(module: str) -> set[str]:
    """Functions and values that a module of ours defines at its top level, read without importing it."""
    return {function or value for function, value in DEFINED.findall(_source(module))}


def is_resumable(stage: Stage) -> bool:
    """Whether an interrupted run of the stage is taken up where it ended."""
    return "resumable_as" in defined_names(stage.module)


@cache
def imported_modules(module: str) -> frozenset[str]:
    """Modules of ours that `module` imports, anywhere in its source, read without importing it.

    Found by their form, which a parser would take a second for; a text that looks like an import counts as one.
    """
    found = set()
    for source, names, alone in IMPORT.findall(_source(module)):
        listed = [words.split()[0] for words in re.sub(r"#.*|[()]", "", names or alone).split(",") if words.strip()]
        found |= {source, *(f"{source}.{name}" for name in listed)} if source else {*listed}
    own = {name for name in found if name.split(".")[0] in OWN_PACKAGES}
    return frozenset(name for name in own if _source_path(name).exists())


@cache
def source_digests(module: str) -> dict[str, str]:
    """sha256 of the source of `module` and of all of ours that it imports, directly or not, by module name.

    A stage whose ranks run another module names it in `RUNS = "flows.training.__main__"`, which counts like an import.
    """
    seen: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= (imported_modules(name) | {*RUN.findall(_source(name))}) - seen
    return {name: digest_file(_source_path(name)) for name in sorted(seen)}


class ArtifactStore:
    """The artifacts below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def key(self, stage: Stage) -> str:
        """Name under which the stage's output is kept."""
        return f"{stage.name}-{digest_json(stage.ingredients)[:20]}"

    def workplace(self, stage: Stage) -> Path:
        """Directory in which the stage's output is made; a resumable stage finds there what an interrupted run left.

        A run that is taken up with another number of ranks is another artifact, with a key of its own, that is made
        from the same checkpoints. So the name leaves out of the ingredients what `resumable_as` leaves out, and
        nothing else: other data, code or initial weights start afresh.
        """
        ingredients = stage.ingredients
        if is_resumable(stage):
            config = importlib.import_module(stage.module).resumable_as(stage.config)
            ingredients = {**ingredients, "config": to_plain(config)}
        return self.root / f"{stage.name}-{digest_json(ingredients)[:20]}.partial"

    def find(self, stage: Stage) -> tuple[Artifact | None, str]:
        """The stage's finished output, every byte verified, and a sentence that says why it can or cannot be used."""
        try:
            artifact = load_artifact(self.root / self.key(stage))
        except FileNotFoundError:
            left = is_resumable(stage) and self.workplace(stage).exists()
            return None, "no artifact was made from these inputs yet" + (CARRIES_ON if left else "")
        except ArtifactError as error:
            return None, f"its artifact is damaged: {error}"
        if "is_current" in defined_names(stage.module) and not importlib.import_module(stage.module).is_current(
            artifact
        ):
            return None, "what it had put in place outside the store is gone or changed"
        return artifact, "its artifact exists and verifies"

    def make(self, stage: Stage) -> Artifact:
        """The stage's output: found if it is whole, made otherwise.

        Raises:
            ArtifactError: The code changed while it ran.
            RunError: The disk is full.
        """
        key = self.key(stage)
        aside = self.workplace(stage)
        with self._lock(aside.stem):  # another flow may be making the same thing
            found, _ = self.find(stage)
            if found is not None:
                return found
            module = cast(StageModule, importlib.import_module(stage.module))
            if aside.exists() and not is_resumable(stage):
                shutil.rmtree(aside)
            aside.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            with full_disk_said(self.root):
                metrics = module.build(aside, stage.config, stage.parents)
                _seal(aside, stage, key, metrics, time.monotonic() - started)
            final = self.root / key
            if final.exists():  # damaged, or no longer current
                shutil.rmtree(final)
            aside.rename(final)
            return load_artifact(final)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go when this process ends, however it ends
            yield


def _seal(directory: Path, stage: Stage, key: str, metrics: Mapping[str, Any], seconds: float) -> None:
    (directory / MANIFEST).unlink(missing_ok=True)
    files = _digest_files(directory)
    manifest = {
        "stage": stage.name,
        "key": key,
        "digest": _content_digest(files),
        "files": files,
        "ingredients": stage.ingredients,
        "parents": {role: {"key": parent.key, "digest": parent.digest} for role, parent in stage.parents.items()},
        "metrics": metrics,
        "seconds": round(seconds, 3),
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": library_versions(),
    }
    read_back = json.loads(json.dumps(manifest))  # tuples are lists then, keys are strings
    write_json_atomically(directory / MANIFEST, read_back | {OWN_DIGEST: digest_json(read_back)})


def _digest_files(directory: Path) -> dict[str, str]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        digests = list(pool.map(digest_file, paths))
    return {path.relative_to(directory).as_posix(): digest for path, digest in zip(paths, digests, strict=True)}


def _content_digest(files: Mapping[str, str]) -> str:
    return digest_json({name: digest for name, digest in files.items() if not name.startswith(f"{RECORDS_DIR}/")})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished artifact.

    Raises:
        FileNotFoundError: There is none.
        ArtifactError: It is not readable as JSON.
    """
    try:
        return cast(dict[str, Any], json.loads((directory / MANIFEST).read_text()))
    except ValueError as error:
        raise ArtifactError(f"{MANIFEST} is not JSON: {error}") from error


def load_artifact(directory: Path) -> Artifact:
    """The artifact in `directory`, every byte of it compared with its manifest.

    Raises:
        FileNotFoundError: There is no finished artifact.
        ArtifactError: A file is missing, extra or changed; the message names it.
    """
    manifest = read_manifest(directory)
    if manifest.pop(OWN_DIGEST, None) != digest_json(manifest):
        raise ArtifactError(f"{MANIFEST} has changed since it was written")
    expected = manifest["files"]
    actual = _digest_files(directory)
    actual.pop(MANIFEST)
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            raise ArtifactError(f"{name} is missing")
        if name not in expected:
            raise ArtifactError(f"{name} does not belong to it")
        if actual[name] != expected[name]:
            raise ArtifactError(f"{name} has sha256 {actual[name][:12]}, not {expected[name][:12]} as when it was made")
    return Artifact(
        stage=manifest["stage"],
        key=manifest["key"],
        digest=manifest["digest"],
        path=directory,
        metrics=manifest["metrics"],
        seconds=manifest["seconds"],
    )


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results."""
    versions = {"python": platform.python_version()}
    for library in RECORDED_LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return versions
