"""Where one user's commands are typed, and what they leave there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Workplace:
    """Directories of one user's runs."""

    root: Path
    api_url: str = ""
    """Address of a Prefect server; none: the temporary one of each command."""

    @property
    def words(self) -> list[str]:
        """What sends a command's output here."""
        return [f"artifacts_dir={self.root}/artifacts", f"publish.model_repo={self.root}/model_repo"]

    @property
    def environment(self) -> dict[str, str]:
        """A Prefect home of our own, and no server but the one that is named."""
        return {**os.environ, "PREFECT_HOME": str(self.root.parent / "prefect"), "PREFECT_API_URL": self.api_url}

    def command(self, verb: str, *words: str) -> list[str]:
        return [sys.executable, "-m", f"flows.{verb}", *words, *self.words]

    def run(self, verb: str, *words: str) -> Done:
        return subprocess.run(
            self.command(verb, *words),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )

    def stages(self, name: str) -> dict[str, dict[str, Any]]:
        """What each stage of the last run under a name did."""
        rows: dict[str, dict[str, Any]] = json.loads((self.root / f"artifacts/runs/{name}/stages.json").read_text())
        return rows

    def ran(self, name: str) -> list[str]:
        return [stage for stage, row in self.stages(name).items() if row["ran"]]
