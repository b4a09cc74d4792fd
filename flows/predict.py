"""Continues every text of a file with a served model: .jsonl or .parquet in, the same rows in the same order out.

    python -m flows.predict publish.model_name=quickstart predict.input=prompts.jsonl predict.output=answers.jsonl
    python -m flows.predict ... predict.replicas=2                          two servers, started for the time it takes
    python -m flows.predict ... 'predict.servers=[127.0.0.1:8001]'          one that is running

The live version answers, or the one that predict.version names. `answers.jsonl.predict.json` says which that was, and
the sha256 of its passport, where the servers are this command's own. Interrupted anywhere, the same command goes on
where it was, with the version that it began with; a server that is lost loses no row. A row that cannot be answered
keeps its place and says why in `<output_field>_error`.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from flows.artifact import digest_file
from flows.compose import run_cli
from flows.config import Config, ConfigError
from flows.serving.installation import check_server_available
from flows.serving.prediction.predict import begun_version
from flows.serving.prediction.predict import predict as predict_rows
from flows.serving.releases.served_view import ServedView
from flows.serving.releases.state import check_proven, read_aliases
from flows.serving.repository import PASSPORT, lock_repository, model_names, published_names
from flows.serving.server import PREFIX, InferenceServer


def predict(config: Config) -> None:
    """Asks servers that are running, or starts some on the model repository."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    started = time.perf_counter()
    name = config.publish.model_name
    passport = None
    with ExitStack() as running:
        addresses = list(config.predict.servers)
        if not addresses:
            addresses, passport = _start(config, running)
        summary = predict_rows(config.predict, model_names(name)[1], addresses, passport)
    seconds = time.perf_counter() - started
    print(
        f"{summary.rows} rows of {config.predict.input} answered by {name} version {summary.version} in "
        f"{seconds:.1f} s, {summary.errors} with an error: {config.predict.output}"
    )


def _start(config: Config, running: ExitStack) -> tuple[list[str], str]:
    """gRPC addresses of servers of one version, until `running` ends, and the sha256 of its passport."""
    repository, name = config.publish.model_repo, config.publish.model_name
    check_server_available()
    if name not in published_names(repository):
        raise ConfigError(f"publish.model_name={name} has no version in {repository}. Publish one first.")
    scratch = running.enter_context(tempfile.TemporaryDirectory(prefix=f"{PREFIX}-{os.getpid()}-"))
    with lock_repository(repository):  # nobody publishes or promotes while the version is being chosen
        version = begun_version(config.predict) or config.predict.version or read_aliases(repository, name).live
        assert version is not None, "a published model has a live version"
        check_proven(repository, name, version)
        view = ServedView(repository, Path(scratch), only=(name, version))
        view.refresh()
    text = model_names(name)[1]
    servers = [
        InferenceServer(view.path, [text], config.artifacts_dir / f"predict-{number}.log")
        for number in range(config.predict.replicas)
    ]
    addresses = [running.enter_context(server).grpc_address for server in servers]
    return addresses, digest_file(repository / name / str(version) / PASSPORT)


if __name__ == "__main__":
    run_cli(predict, __doc__)
