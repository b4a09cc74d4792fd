"""Refuses a version whose files are not the ones that were verified."""

import hashlib
import json
from pathlib import Path

FILES = "files.json"


def check_files(version_dir: Path) -> None:
    """Raises RuntimeError, naming the file, unless every file listed in `files.json` has its sha256."""
    expected: dict[str, str] = json.loads((version_dir / FILES).read_text())
    for name, digest in sorted(expected.items()):
        path = version_dir / name
        if not path.is_file():
            raise RuntimeError(f"{path} is missing. Publish the model again; this version is not served.")
        actual = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                actual.update(chunk)
        if actual.hexdigest() != digest:
            raise RuntimeError(
                f"{path} has sha256 {actual.hexdigest()[:12]}, not {digest[:12]} as when it was verified. "
                "Publish the model again; this version is not served."
            )
