"""Proves again that a published version is the model that was trained: from data to what a server answers.

    python -m flows.verify model_repo/quickstart                    # the newest version, on a private server
    python -m flows.verify model_repo/quickstart/1 --artifacts artifacts
    python -m flows.verify model_repo/quickstart/1 --http 127.0.0.1:8000 --grpc 127.0.0.1:8001 --metrics 127.0.0.1:8002

Compares digests from raw data to the files on disk and to those that the server says it loaded, scores over every
transport, batch size, length and padding, greedy text token by token, and the tokenizer on strings made up now. A
running server keeps shared memory closed; a private one is asked through that, too. Ends with exit code 1 if anything
differs. `--out` keeps every check with its numbers, as the version's own passport.json does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flows.artifact import write_json_atomically
from flows.config import ConfigError, RunError
from flows.config.checks import require
from flows.serving.endpoint import Endpoint
from flows.serving.proof.reverify import verify_version
from flows.serving.repository import complete_versions


def main(arguments: list[str] | None = None) -> int:
    """Prints what was found; the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="flows.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", type=Path, help="<model repository>/<model name>, or one of its versions")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="artifacts_dir of the run")
    parser.add_argument("--http", help="host:port of a running server; without it, a private one is started")
    parser.add_argument("--grpc", help="host:port of the same server")
    parser.add_argument("--metrics", help="host:port of its metrics, which say what files it loaded")
    parser.add_argument("--log", type=Path, help="where the private server's log goes")
    parser.add_argument("--out", type=Path, help="file for every check with its numbers")
    given = parser.parse_args(arguments)
    try:
        require(bool(given.http) == bool(given.grpc), "--http", given.http, "needs --grpc, and --grpc it", "Give both.")
        repository, name, version = _named(given.version)
        endpoint = Endpoint(given.http, given.grpc, given.metrics) if given.http else None
        found = verify_version(
            repository, name, version, given.artifacts / "store", endpoint=endpoint, log_path=given.log
        )
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if given.out:
        write_json_atomically(given.out, found.passport)
    print("\n".join(found.lines()))
    verdict = "is the model that was trained" if found.passed else "is NOT the model that was trained"
    print(
        f"{name} version {version} {verdict}: {found.passport['checks'] - len(found.failed)} checks passed, "
        f"{len(found.failed)} failed, {found.passport['seconds']} s"
    )
    return 0 if found.passed else 1


def _named(path: Path) -> tuple[Path, str, int]:
    """Repository, model and version that a path names; the newest version if it names none."""
    path = path.absolute()
    if path.name.isdigit():
        return path.parents[1], path.parent.name, int(path.name)
    versions = complete_versions(path.parent, path.name)
    require(bool(versions), "version", path, "holds no published version", "Name <model repository>/<model name>.")
    return path.parent, path.name, versions[-1]


if __name__ == "__main__":
    sys.exit(main())
