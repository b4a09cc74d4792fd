"""The record of the last run under a name: what each stage was made from, whether it ran and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.artifact import CARRIES_ON, Stage, write_json_atomically
from flows.config import Config


@dataclass
class RunRecord:
    """Rows by stage name, kept in `artifacts_dir`/runs/<name>/stages.json and written after every stage."""

    path: Path
    before: dict[str, Any]
    """Rows as an earlier run left them."""
    rows: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, config: Config) -> RunRecord:
        """The record of this run name; empty if it never ran."""
        path = run_dir(config) / "stages.json"
        try:
            before = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            before = {}
        return cls(path, before)

    def why_it_runs(self, stage: Stage, reason: str) -> str:
        """Why there is no usable artifact: what changed since the last run, or else what is wrong with it."""
        if stage.name not in self.before:
            return reason
        change = explain_change(self.before[stage.name]["ingredients"], stage.ingredients)
        if change and reason.endswith(CARRIES_ON):
            change += CARRIES_ON
        return change or reason

    def add(self, stage: Stage, ran: bool, reason: str, key: str, seconds: float) -> None:
        """Remembers what a stage did; rows of stages not yet reached stay as the last run left them."""
        self.rows[stage.name] = {
            "ran": ran,
            "reason": reason,
            "key": key,
            "seconds": round(seconds, 3),
            "ingredients": stage.ingredients,
        }
        write_json_atomically(self.path, self.before | self.rows)


def run_dir(config: Config) -> Path:
    """Where the run's record, log and report are."""
    return config.artifacts_dir / "runs" / config.name


def report_path(config: Config) -> Path:
    """The page that a person looks at after the run."""
    return run_dir(config) / "report.html"


def explain_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Says which ingredients of a stage differ from those of an earlier run; empty if none does.

    Args:
        before: `Stage.ingredients` then.
        after: `Stage.ingredients` now.
    """
    return "; ".join(_describe(path, old, new) for path, old, new in _differences("", before, after))


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{path}/{key}", old.get(key), new.get(key))
    elif old != new:
        yield path, old, new


def _describe(path: str, old: Any, new: Any) -> str:
    _, kind, *names = path.split("/")
    match kind:
        case "config":
            return f"{'.'.join(names)} changed from {old} to {new}"
        case "parents":
            return f"its input {names[0]} changed"
        case "code":
            return f"code changed in {names[0]}"
        case _:
            return "files it reads from outside changed"
