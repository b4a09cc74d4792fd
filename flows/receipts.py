"""Proves from its sample receipts what a model was trained on: `verify` recomputes the stream and compares.

    python -m flows.receipts verify artifacts/runs/quickstart
    python -m flows.receipts verify artifacts/store/base-0123456789abcdef0123

It takes a training stage's artifact, or the directory of a run, of which it proves every trained model. It does not
matter how often the run was interrupted, nor on how many ranks it went on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flows.config import RunError
from flows.training.receipts import verify_receipts


def main(arguments: list[str] | None = None) -> int:
    """Prints one line for each model; the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="flows.receipts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["verify"])
    parser.add_argument("directory", type=Path, help="a trained artifact, or artifacts/runs/<name>")
    directory: Path = parser.parse_args(arguments).directory
    try:
        for artifact in _trained(directory):
            proof = verify_receipts(artifact)
            print(f"{artifact.name}: {proof.steps} steps, {proof.samples} samples, as configured; {proof.link[:12]}")
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _trained(directory: Path) -> list[Path]:
    """The artifact itself, or those of a run's record that were trained."""
    record = directory / "stages.json"
    if not record.exists():
        return [directory]
    store = directory.parents[1] / "store"
    stages = json.loads(record.read_text()).values()
    found = [store / row["key"] for row in stages if "tokens" in row["ingredients"]["parents"] and _is_training(row)]
    if not found:
        raise RunError(f"{directory} is of a run that trained no model yet.")
    return found


def _is_training(row: dict[str, dict[str, dict[str, str]]]) -> bool:
    return "flows.training.stage" in row["ingredients"]["code"]


if __name__ == "__main__":
    sys.exit(main())
