"""Scheduled runs, one file each: what a file of conf/deployment/ says, read and checked before it is registered."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.compose import CONF_DIR, compose_config
from flows.config import ConfigError

DEPLOYMENT_DIR = CONF_DIR / "deployment"
FLOWS = {"train": "flows.train_flow.train"}
"""Flows that can be scheduled, by name: where each is imported from."""


class DeploymentFile(BaseModel, frozen=True, extra="forbid", strict=True):
    """A schedule and the command line that it stands for."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Unique per flow; a run is started by hand with `prefect deployment run '<flow>/<name>'`."""
    flow: str
    """A key of `FLOWS`."""
    cron: str
    """Minute, hour, day of month, month, day of week."""
    timezone: str = "UTC"
    """IANA name, in which `cron` is read."""
    overrides: list[str] = []
    """What the command line would say; composed when a run starts."""
    tags: list[str] = []
    """Shown and filtered by in Prefect, besides our own tag."""
    description: str = ""

    @property
    def full_name(self) -> str:
        """Name on the server."""
        return f"{self.flow}/{self.name}"


def read_deployment_files(directory: Path) -> dict[Path, DeploymentFile]:
    """Every .yaml and .yml file of a directory by its path, in order of names; each one composes to a valid Config.

    Raises:
        ConfigError: A file is not YAML, a key is unknown or missing, a flow does not exist, an override is wrong, or
            two files give the same name. The message names file, key and remedy.
    """
    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is not a directory. Name one that holds deployment files, as {DEPLOYMENT_DIR} does."
        )
    files: dict[Path, DeploymentFile] = {}
    paths: dict[str, Path] = {}
    for path in sorted(path for path in directory.iterdir() if path.suffix in (".yaml", ".yml")):
        files[path] = file = _read(path)
        if file.full_name in paths:
            raise ConfigError(
                f"{path}: name={file.name} is taken by {paths[file.full_name]} for the same flow. "
                "Give each file a name of its own."
            )
        paths[file.full_name] = path
    return files


def _read(path: Path) -> DeploymentFile:
    try:
        file = DeploymentFile.model_validate(YAML(typ="safe", pure=True).load(path))
    except YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None
    if file.flow not in FLOWS:
        raise ConfigError(f"{path}: flow={file.flow} cannot be scheduled. Choose one of: {', '.join(FLOWS)}.")
    try:
        compose_config(file.overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: overrides: {error}") from error
    return file


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "extra_forbidden":
            return f"{key} is not a setting of a deployment. {_nearest(key, list(DeploymentFile.model_fields))}"
        case "missing":
            return f"{key} is missing. Required: name, flow, cron."
        case "model_type":
            return f"must hold settings such as name: nightly, not {first['input']!r}."
        case "string_pattern_mismatch":
            return (
                f"{key}={first['input']} must be letters, digits, '_' or '-': it is part of a URL. Set name: nightly."
            )
        case _:
            return f"{key}={first['input']!r}: {first['msg']}."


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"Settings: {', '.join(known)}."
