"""Refuses a version whose files are not the ones that were verified."""

import hashlib
import json
from pathlib import Path
from typing import Any

FILES = "files.json"


def check_files(version_dir: Path) -> str:
    """sha256 of `files.json` itself; RuntimeError, naming the file, unless every file listed there has its sha256."""
    listing = (version_dir / FILES).read_bytes()
    expected: dict[str, str] = json.loads(listing)
    for name, digest in sorted(expected.items()):
        check_file(version_dir / name, digest)
    return hashlib.sha256(listing).hexdigest()


def check_file(path: Path, digest: str) -> None:
    """RuntimeError, naming the file, unless it has this sha256."""
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


def state_files(server: Any, labels: dict[str, str], digest: str) -> Any:
    """Has the server's metrics say what was loaded; the metric is there as long as what this returns is kept.

    Args:
        server: `triton_python_backend_utils`.
        labels: Model and version.
        digest: What `check_files` returned.
    """
    family = server.MetricFamily(
        name="millrace_version_info",
        description="1 for each loaded version; files: sha256 of the files.json that its files were checked against",
        kind=server.MetricFamily.GAUGE,
    )
    metric = family.Metric(labels={**labels, "files": digest})
    metric.set(1)
    return family, metric
