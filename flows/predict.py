"""Continues every text of a file with a served model: .jsonl or .parquet in, the same rows in the same order out.

    python -m flows.predict publish.model_name=quickstart predict.input=prompts.jsonl predict.output=answers.jsonl
    python -m flows.predict ... predict.replicas=2                          two servers, started for the time it takes
    python -m flows.predict ... 'predict.servers=[127.0.0.1:8001]'          one that is running

Interrupted anywhere, the same command goes on where it was; a server that is lost loses no row. A row that cannot be
answered keeps its place and says why in `<output_field>_error`.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack

from flows.compose import run_cli
from flows.config import Config, ConfigError
from flows.serving.installation import check_server_available
from flows.serving.predict import predict as predict_rows
from flows.serving.repository import complete_versions, model_names
from flows.serving.server import InferenceServer


def predict(config: Config) -> None:
    """Asks servers that are running, or starts some on the model repository."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    started = time.perf_counter()
    repository, name = config.publish.model_repo, config.publish.model_name
    with ExitStack() as running:
        addresses = list(config.predict.servers)
        if not addresses:
            check_server_available()
            if not complete_versions(repository, name):
                raise ConfigError(f"publish.model_name={name} has no version in {repository}. Publish one first.")
            for number in range(config.predict.replicas):
                log_path = config.artifacts_dir / f"predict-{number}.log"
                server = InferenceServer(repository, model_names(name), log_path)
                addresses.append(running.enter_context(server).grpc_address)
        summary = predict_rows(config.predict, model_names(name)[1], addresses)
    seconds = time.perf_counter() - started
    print(
        f"{summary.rows} rows of {config.predict.input} answered by {name} version {summary.version} in "
        f"{seconds:.1f} s, {summary.errors} with an error: {config.predict.output}"
    )


if __name__ == "__main__":
    run_cli(predict, __doc__)
