"""Stage `passport`: proof that the model that a real inference server serves is the model that was trained.

Starts a private server on the entry that is about to be published and compares what it answers with the checkpoint. The
tolerance is the model's own float noise, not a guess: a few times the checkpoint's float32 error on the same inputs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.artifact import RECORDS_DIR, Artifact, write_json_atomically
from flows.config.serving import PassportConfig
from flows.serving.client import Transport
from flows.serving.entry import FILES, REPOSITORY, STAGED_VERSION
from flows.serving.installation import ServerError
from flows.serving.proof.config_check import check_config_files
from flows.serving.proof.passport import (
    PassportError,
    check_digests,
    check_server,
    describe,
    expect,
    staged_files,
    state,
)
from flows.serving.repository import PASSPORT
from flows.serving.server import InferenceServer

__all__ = ["PASSPORT", "PassportError", "build"]


def build(directory: Path, config: PassportConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes `passport.json`: verdict, every check with its numbers, and all digests from data to served files.

    Raises:
        PassportError: Served and trained differ; the message names the check and its numbers.
    """
    started = time.monotonic()
    staged = parents["entry"].path / REPOSITORY
    expected = expect(config, parents)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:  # the server writes byte code beside the models
        repository = Path(scratch) / REPOSITORY
        shutil.copytree(staged, repository, copy_function=os.link)
        stated = staged_files(parents["entry"], expected.models)
        checks = [check_digests(repository, STAGED_VERSION, expected.models, parents, stated)]
        checks += check_config_files(repository, expected.configs)
        listings = {name: files[FILES] for name, files in stated.items()}
        try:
            with InferenceServer(repository, expected.models, directory / RECORDS_DIR / "server.log") as server:
                with server.endpoint.connect(Transport.http) as client:
                    server_version = client.server_version()
                found, skipped = check_server(server.endpoint, STAGED_VERSION, expected, listings)
        except ServerError as error:
            raise PassportError(f"The model cannot be served, so nothing was published. {error}") from error
    checks += found
    passport, summary = state(expected, parents, checks, skipped, server_version, started)
    write_json_atomically(directory / PASSPORT, passport)
    if failed := [check for check in checks if not check.passed]:
        lines = [
            f"The served model is not the trained one: {len(failed)} checks failed. Nothing was published.",
            f"All numbers: {directory / PASSPORT}",
            *describe(failed),
        ]
        raise PassportError("\n".join(lines))
    return summary
