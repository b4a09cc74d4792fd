"""Stage `<name>_quality`: `flows.evaluation.quality`, and what decides it from outside the store.

Every run asks for that, also one that skips the stage: so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.artifact import Artifact
from flows.config.compression import QualityConfig
from flows.evaluation.task_files import fingerprint_tasks


def fingerprint(config: QualityConfig) -> str | None:
    """Digest of the task files, where there are any."""
    return None if config.tasks.directory is None else fingerprint_tasks(config.tasks.directory)


def build(directory: Path, config: QualityConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes quality.json; see `flows.evaluation.quality.build`."""
    from flows.evaluation import quality

    return quality.build(directory, config, parents)
