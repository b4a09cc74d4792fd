"""What a training stage refuses before it starts a rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.config import ConfigError
from flows.config.training import TrainingRun


def test_a_split_too_short_to_measure_on_is_refused_before_training(
    data: dict[str, Artifact], trained: Callable[..., Artifact], tiny_run: Callable[..., TrainingRun], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="sequence_length=2000 needs at least 2001 tokens in the test split"):
        trained(replace(tiny_run(), sequence_length=2000), validation=_with_short_test_split(data["tokens"], tmp_path))
    assert not list(tmp_path.rglob("run.json")), "no rank was started"


def _with_short_test_split(tokens: Artifact, tmp_path: Path) -> Artifact:
    """The same tokens, with the training split to validate on."""
    directory = tmp_path / "tokens"
    shutil.copytree(tokens.path, directory)
    index = json.loads((directory / "index.json").read_text())
    index["splits"]["validation"] = index["splits"]["train"]
    (directory / "index.json").write_text(json.dumps(index))
    return replace(tokens, path=directory)
