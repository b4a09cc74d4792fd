"""The model repository on disk: names, complete versions, and the lock that keeps writers and loaders apart."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG = "config.pbtxt"
PASSPORT = "passport.json"
VERSION_CONFIG = "model_config"
"""Directory of a version with what was beside the versions when it was published: config.pbtxt, configs/, warmup/."""
TEXT_SUFFIX = "_text"


def model_names(model_name: str) -> tuple[str, str]:
    """The two models that are published under a name: scores and text."""
    return model_name, f"{model_name}{TEXT_SUFFIX}"


def published_names(repository: Path) -> list[str]:
    """Names under which there are complete versions."""
    names = {path.name.removesuffix(TEXT_SUFFIX) for path in repository.glob(f"[!.]*{TEXT_SUFFIX}") if path.is_dir()}
    return sorted(name for name in names if complete_versions(repository, name))


def complete_versions(repository: Path, model_name: str) -> list[int]:
    """Published versions of a model that are there for scores and for text, in rising order."""
    scores, text = ({path.name for path in version_dirs(repository / name)} for name in model_names(model_name))
    return sorted(int(name) for name in scores & text)


def version_dirs(model_dir: Path) -> list[Path]:
    """Version directories of one of the two models, complete or not."""
    if not model_dir.is_dir():
        return []
    return [path for path in model_dir.iterdir() if path.is_dir() and re.fullmatch(r"[1-9][0-9]*", path.name)]


def link_or_copy(source: str, target: str) -> None:
    """One file in two places, or a copy where the file system cannot do that; as a `copy_function` of shutil."""
    try:
        os.link(os.path.realpath(source), target)  # of what a symbolic link points to
    except OSError:  # another file system
        shutil.copyfile(source, target)


@contextmanager
def lock_repository(repository: Path, *, wait: bool = True) -> Iterator[bool]:
    """Keeps publishers, promoters, and servers that load, out of each other's way; yields whether it has the lock.

    Args:
        repository: Model repository; the lock leaves no file in it and goes with the process that holds it.
        wait: Whether to wait for whoever has it; otherwise yields False.
    """
    handle = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)
