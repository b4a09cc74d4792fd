"""Generated tokens per second and waiting times under load, against transformers' `generate` behind FastAPI.

    python -m flows.serving.generation_bench model_repo quickstart artifacts/store/base-... --clients 1 4 16 64

The last argument is the directory of the floating-point model that was published (`publish.candidate=base`). Needs the
extra `transformers`. Greedy texts of all ways are compared before anything is timed. All ways take turns on the same
prompts: ours over gRPC, streamed, and as whole answers; one FastAPI worker that generates one request after the other,
as whole answers; and, without any server, batches of as many prompts as there are clients, each as slow as its longest
text. Then scores of token ids, ours over gRPC against the same worker.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.config import ConfigError, RunError
from flows.serving.client import Client, Transport
from flows.serving.generation_rival import Rival
from flows.serving.load import Connection, Load, ask_text, under_load
from flows.serving.repository import complete_versions, model_names
from flows.serving.server import InferenceServer

MAX_TOKENS = 64
REQUESTS = 64
"""At least; four per client if that is more."""
SCORE_CLIENTS, SCORE_REQUESTS, SCORE_TOKENS = 32, 512, 128
SCORE_DIFFERENCE = 1e-3
"""Of the largest score: by how much two programs of one model may differ here. The passport has its own tolerance."""
START_TIMEOUT_S = 120.0
PROMPTS = (
    "import os\n\ndef main(",
    "class Node:\n    def __init__(self",
    "for name in",
    "    return self._",
    "def parse_arguments(argv):\n    parser = argparse.",
    "try:\n    import ",
    "#",
    "raise ValueError(f",
)


def run(repository: Path, model_name: str, checkpoint: Path, clients: Sequence[int]) -> None:
    """Prints a table.

    Raises:
        ConfigError: No such model was published.
        RunError: The ways do not give the same texts.
    """
    if not complete_versions(repository, model_name):
        raise ConfigError(f"publish.model_name={model_name} has no version in {repository}. Publish one first.")
    rival = Rival(checkpoint)
    with (
        tempfile.TemporaryDirectory() as scratch,
        InferenceServer(repository, model_names(model_name), Path(scratch) / "server.log") as server,
        _FastApi(checkpoint, Path(scratch) / "fastapi.log") as fast_api,
    ):
        text = model_names(model_name)[1]

        def connect() -> Client:
            return Client(Transport.grpc, server.grpc_address)

        def streamed(client: Client, prompt: str, load: Load) -> str:
            return ask_text(client, text, prompt, MAX_TOKENS, load)

        def whole(client: Client, prompt: str, load: Load) -> str:
            answer = client.generate(text, prompt, options={"max_tokens": MAX_TOKENS})
            load.tokens.append(answer.completion_tokens)
            return answer.text

        with connect() as client:
            _check_texts(lambda prompt: streamed(client, prompt, Load()), rival)
        print(f"{MAX_TOKENS} tokens a request, greedy; tokens/s of all clients together, other numbers in ms")
        print(f"{'':8}{'ours':>10}{'whole':>8}{'FastAPI':>10}{'ratio':>8}{'static batch':>14}{'ratio':>8}", end="")
        print("".join(f"{name:>16}" for name in ("first p50", "first p95", "between p50", "between p95")))
        for count in clients:
            requests = max(REQUESTS, 4 * count)
            ours = _under_load(count, requests, connect, streamed)
            at_once = _under_load(count, requests, connect, whole)
            theirs = _under_load(count, min(requests, 2 * REQUESTS), fast_api.connect, fast_api.ask)
            static = _static(rival, count, requests)
            ratios = [ours.tokens_per_s / other.tokens_per_s for other in (theirs, static)]
            print(
                f"{count:<8}{ours.tokens_per_s:10.0f}{at_once.tokens_per_s:8.0f}{theirs.tokens_per_s:10.0f}{ratios[0]:8.2f}"
                f"{static.tokens_per_s:14.0f}{ratios[1]:8.2f}",
                end="",
            )
            measured = (ours.first_ms, ours.between_ms)
            print("".join(f"{np.percentile(values, share):16.1f}" for values in measured for share in (50, 95)))
        _compare_scores(connect, model_name, fast_api)


def _check_texts(ours: Callable[[str], str], rival: Rival) -> None:
    for prompt in PROMPTS:
        expected, found = rival.generate([prompt], MAX_TOKENS)[0], ours(prompt)
        if expected.text != found:
            raise RunError(
                f"{prompt!r} is followed by {found!r} and, by transformers, by {expected.text!r}. Nothing was timed. "
                "Publish the floating-point model whose directory this is: publish.candidate=base."
            )


def _under_load(
    clients: int,
    requests: int,
    connect: Callable[[], AbstractContextManager[Connection]],
    ask: Callable[[Connection, str, Load], str],
) -> Load:
    with connect() as connection:
        for prompt in PROMPTS[:2]:
            ask(connection, prompt, Load())
    return under_load(clients, islice(cycle(PROMPTS), requests), connect, ask)


def _compare_scores(connect: Callable[[], Client], model: str, fast_api: _FastApi) -> None:
    """Prints scores of ours and theirs per second, and their ratio."""
    ids = np.arange(SCORE_TOKENS, dtype=np.int64) % 256
    requests = [np.roll(ids, number) for number in range(SCORE_REQUESTS)]

    def ask(client: Client, ids_L: NDArray[np.int64], load: Load) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = client.scores(model, ids_L[None], np.ones_like(ids_L[None]))[0]
        load.tokens.append(1)
        return scores

    with connect() as client, fast_api.connect() as connection:
        ours, theirs = ask(client, ids, Load()), fast_api.scores(connection, ids, Load())
    if (difference := float(np.abs(ours - theirs).max())) > SCORE_DIFFERENCE * float(np.abs(theirs).max()):
        raise RunError(f"Scores differ from those of transformers by {difference:.3g}. They were not timed.")
    loads = (
        under_load(SCORE_CLIENTS, iter(requests), connect, ask),
        under_load(SCORE_CLIENTS, iter(requests), fast_api.connect, fast_api.scores),
    )
    per_s = [load.answers_per_s for load in loads]
    print(
        f"scores of {SCORE_TOKENS} tokens, {SCORE_CLIENTS} clients: ours {per_s[0]:.0f}/s, FastAPI {per_s[1]:.0f}/s, "
        f"ratio {per_s[0] / per_s[1]:.2f}"
    )


def _static(rival: Rival, batch: int, requests: int) -> Load:
    load = Load()
    started = time.perf_counter()
    for first in range(0, requests, batch):
        prompts = [PROMPTS[number % len(PROMPTS)] for number in range(first, min(first + batch, requests))]
        load.tokens += [one.tokens for one in rival.generate(prompts, MAX_TOKENS)]
    load.seconds = time.perf_counter() - started
    return load


class _FastApi:
    """One worker that serves `Rival`."""

    def __init__(self, checkpoint: Path, log: Path) -> None:
        self._checkpoint, self._log = checkpoint, log

    def __enter__(self) -> _FastApi:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [sys.executable, "-m", "flows.serving.generation_rival", str(self._checkpoint), str(self._port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with self.connect() as connection:
                    self.ask(connection, PROMPTS[0], Load())
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RunError(f"FastAPI did not start:\n{self._log.read_text()[-2000:]}") from None
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def connect(self) -> AbstractContextManager[http.client.HTTPConnection]:
        """A client's connection."""
        return closing(http.client.HTTPConnection("127.0.0.1", self._port))

    def ask(self, connection: http.client.HTTPConnection, prompt: str, load: Load) -> str:
        """One text."""
        answer = json.loads(_post(connection, "/generate", {"prompt": prompt, "max_tokens": MAX_TOKENS}))
        load.tokens.append(answer["tokens"])
        return str(answer["text"])

    def scores(
        self, connection: http.client.HTTPConnection, ids_L: NDArray[np.int64], load: Load
    ) -> NDArray[np.float32]:
        """Scores [V] of the token after the last one."""
        scores = np.frombuffer(_post(connection, "/scores", {"ids": ids_L.tolist()}), np.float32)
        load.tokens.append(1)
        return scores


def _post(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> bytes:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse().read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("model_name")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    arguments = parser.parse_args()
    run(arguments.repository, arguments.model_name, arguments.checkpoint, arguments.clients)
