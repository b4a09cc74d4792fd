"""Task files of the evaluation harness: which of them can be run with what is on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.artifact import digest_file, digest_json
from flows.config.checks import ConfigError, require

FIELD = "evaluate.tasks.directory"
LOCAL_FORMATS = ("json", "csv", "parquet", "text")
"""What the datasets library reads from files by itself."""


def check_tasks(directory: Path) -> None:
    """Raises `ConfigError` unless the harness is installed and every task of the directory needs local files only."""
    read_tasks(directory)
    require(
        importlib.util.find_spec("lm_eval") is not None,
        FIELD,
        directory,
        "needs the package lm_eval, which is not installed",
        "pip install -e '.[harness]', or set it to null.",
    )


def fingerprint_tasks(directory: Path) -> str:
    """Digest of all files of a directory of tasks."""
    return digest_json({path.relative_to(directory).as_posix(): digest_file(path) for path in _files(directory, "*")})


def read_tasks(directory: Path) -> list[dict[str, Any]]:
    """The tasks of a directory's YAML files, as the harness takes them, with data files named in full.

    Raises:
        ConfigError: There is none, or one would need the network, or code besides the harness's own.
    """
    tasks = [_read(path) for path in _files(directory, "*.yaml")]
    require(
        bool(tasks), FIELD, directory, "has no task: no file in it ends with .yaml", "Name a directory of task files."
    )
    return tasks


def _read(path: Path) -> dict[str, Any]:
    try:
        task = YAML(typ="safe").load(path.read_text())  # refuses `!function`, which would run any code
    except YAMLError as error:
        raise ConfigError(f"{FIELD}: {path} is not plain YAML: {str(error).splitlines()[0]}. Remove tags.") from error
    task = task if isinstance(task, Mapping) else {}
    settings = task.get("dataset_kwargs")
    settings = settings if isinstance(settings, Mapping) else {}
    files = settings.get("data_files")
    if not isinstance(files, Mapping) or task.get("dataset_path") not in LOCAL_FORMATS or "task" not in task:
        raise ConfigError(
            f"{FIELD}: {path} must name its task and files on this machine. Set task, dataset_path to one of "
            f"{list(LOCAL_FORMATS)} and dataset_kwargs.data_files by split, e.g. {{test: questions.jsonl}}."
        )
    found = {split: path.parent / name for split, name in files.items()}
    for data in found.values():
        if not data.is_file():
            raise ConfigError(f"{FIELD}: {path} names {data}, which does not exist. Put it beside the task.")
    named = {split: str(data.absolute()) for split, data in found.items()}
    return {**task, "dataset_kwargs": {**settings, "data_files": named}}


def _files(directory: Path, pattern: str) -> list[Path]:
    return sorted(path for path in directory.glob(f"**/{pattern}") if path.is_file())
