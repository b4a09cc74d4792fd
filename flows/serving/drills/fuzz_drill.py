"""Fault drill of the public endpoint: malformed requests by the thousand, and a server that dies behind it.

    python -m flows.serving.drills.fuzz_drill model_repo/quickstart/1
    python -m flows.serving.drills.fuzz_drill model_repo/quickstart/1 --requests 500 --seed 7

Works on a copy of one version. While the requests come, a neighbour asks for scores and texts and has to get the right
ones all the time. Then models are loaded again and again, a model's process and the server itself are killed. Prints
what happened; ends with exit code 1 if anything crashed, hung, answered wrongly or stayed behind.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np

from flows.config import ConfigError, RunError
from flows.config.checks import require
from flows.serving.drills.fuzz_requests import FuzzRequest, http, infer_body, make_request
from flows.serving.installation import ServerError
from flows.serving.proof.reverify import copy_version, version_place
from flows.serving.public_endpoint.openai_server import OpenAIServer
from flows.serving.repository import model_names
from flows.serving.server import PREFIX, SHARED_MEMORY_DIR, InferenceServer

ANSWER_S = 120.0
"""Longest time without an answer."""
RETRY_S = 0.5
CLIENTS = 8
FLOOD = 64
"""Requests that are sent at the same moment, once in `FLOOD_EVERY`."""
FLOOD_EVERY = 1000
RELOADS = 10
SCORE_ULPS = 64
"""Units in the last place of the largest score by which a batch that is padded otherwise may differ."""
END_S, POLL_INTERVAL_S = 60.0, 0.05
NO_ANSWER = "no answer"
ANSWERED = (200, 499)
BUSY = 503


@dataclass
class Outcome:
    """What a drill saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Requests by kind and status."""
    neighbour_answers: int = 0
    problems: list[str] = field(default_factory=list)
    """Empty if all went as it should."""

    def lines(self) -> list[str]:
        """For a person."""
        kinds: dict[str, list[str]] = {}
        for name, count in sorted(self.statuses.items()):
            kind, _, status = name.rpartition(": ")
            kinds.setdefault(kind, []).append(f"{count} x {status}")
        lines = [f"{kind:<12} {', '.join(found)}" for kind, found in kinds.items()]
        lines.append(f"{self.neighbour_answers} right answers to the neighbour")
        return lines + [f"PROBLEM: {problem}" for problem in self.problems[:20]]


class Neighbour:
    """A client that does nothing wrong, and notes every answer that is not the right one.

    Args:
        address: `host:port` of the public endpoint.
        model: Name of the scores model.
        key: That the endpoint asks for.
    """

    def __init__(self, address: str, model: str, key: str) -> None:
        self._address, self._model, self._key = address, model, key
        self.answers, self.problems = 0, list[str]()
        self._stop = threading.Event()
        self._right = self._first_answer()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def ask(self) -> tuple[np.ndarray[Any, Any], str]:
        """Scores of a few tokens, and a text."""
        scores = self._post(f"/v2/models/{self._model}/infer", infer_body([1, 2, 3], [1, 1, 1], [1, 3]))
        text = {"model": self._model, "prompt": "def", "max_tokens": 4, "temperature": 0}
        answer = self._post("/v1/completions", text)
        return np.array(scores["outputs"][0]["data"]), str(answer["choices"][0]["text"])

    def _first_answer(self) -> tuple[np.ndarray[Any, Any], str]:
        """What is right; connections that a flood before has left open may have to end first."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            try:
                return self.ask()
            except urllib.error.HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(f"http://{self._address}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            answer: dict[str, Any] = json.loads(response.read())
        return answer

    def _work(self) -> None:
        allowed = SCORE_ULPS * np.finfo(np.float32).eps * np.abs(self._right[0]).max()
        while not self._stop.is_set():
            try:
                scores, text = self.ask()
            except (OSError, ValueError, KeyError) as error:
                told = error.read()[:200] if isinstance(error, urllib.error.HTTPError) else ""
                self.problems.append(f"the neighbour was not answered: {error} {told!r}")
                continue
            if text != self._right[1] or np.abs(scores - self._right[0]).max() > allowed:
                self.problems.append(f"the neighbour got a wrong answer: {text!r}")
            self.answers += 1


def send(address: str, request: FuzzRequest) -> str:
    """Status of the answer, or `NO_ANSWER`; raises TimeoutError where the endpoint hangs."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), ANSWER_S) as connection:
        answer = b""
        with suppress(ConnectionError):  # who is answered early need not send the rest
            connection.sendall(request.raw)
        if request.hangs_up:
            return "hung up"
        with suppress(ConnectionError):
            connection.shutdown(socket.SHUT_WR) if not request.is_http else None
            while part := connection.recv(1 << 16):
                answer += part
    return answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/1.1 ") else NO_ANSWER


def problem(request: FuzzRequest, status: str) -> str | None:
    """What is wrong with that answer to that request, if anything."""
    if request.hangs_up or not request.is_http:
        return None
    if status == NO_ANSWER:
        return f"{request.kind}: no answer to {request.raw[:200]!r}"
    if not ANSWERED[0] <= int(status) <= ANSWERED[1] and int(status) != BUSY:
        return f"{request.kind}: status {status} to {request.raw[:300]!r}"
    if request.kind == "good" and status not in ("200", "401", "429"):
        return f"{request.kind}: status {status} to {request.raw[:300]!r}"
    return None


def fuzz(address: str, server: InferenceServer, model: str, key: str, requests: int, seed: int) -> Outcome:
    """Sends the requests, some of them all at once, while a neighbour works.

    Args:
        address: `host:port` of the public endpoint.
        server: What stands behind it, which has to run still at the end.
        model: Name of the scores model.
        key: That the endpoint asks for.
        requests: How many.
        seed: Of the requests.
    """
    outcome = Outcome()

    def one(number: int) -> None:
        request = make_request(number, model, key, seed)
        try:
            status = send(address, request)
        except OSError as error:
            outcome.problems.append(f"request {number}, {request.kind}: {error!r} to {request.raw[:200]!r}")
            return
        if told := problem(request, status):
            outcome.problems.append(f"request {number}, {told}")
        outcome.statuses[f"{request.kind}: {status}"] += 1

    with Neighbour(address, model, key) as neighbour:
        for start in range(0, requests, FLOOD_EVERY):
            numbers = range(start, min(start + FLOOD_EVERY, requests))
            flood, rest = numbers[:FLOOD], numbers[FLOOD:]
            for part, clients in ((flood, FLOOD), (rest, CLIENTS)):
                with ThreadPoolExecutor(clients) as pool:
                    list(pool.map(one, part))
    outcome.neighbour_answers += neighbour.answers
    outcome.problems += neighbour.problems
    try:
        server.check_running()
    except ServerError as error:
        outcome.problems.append(str(error))
    return outcome


def reload_storm(address: str, server: InferenceServer, models: Sequence[str], key: str) -> Outcome:
    """Loads the models again and again while a neighbour works; each time one of their files has changed its date."""
    outcome = Outcome()
    with Neighbour(address, models[0], key) as neighbour:
        for number in range(RELOADS):
            (server.repository / models[number % 2] / "config.pbtxt").touch()
            for model in models:
                server.load(model)
                outcome.statuses["reload: done"] += 1
    outcome.neighbour_answers, outcome.problems = neighbour.answers, neighbour.problems
    return outcome


def kill_behind(address: str, model: str, key: str, victims: dict[str, int]) -> Outcome:
    """Kills processes one after the other; the endpoint answers all the same, that it cannot.

    Args:
        address: `host:port` of the public endpoint.
        model: Name of the scores model.
        key: That the endpoint asks for.
        victims: Process ids by what they are.
    """
    outcome = Outcome()
    paths = {f"/v2/models/{model}/infer": infer_body([1, 2, 3], [1, 1, 1], [1, 3])}
    paths["/v1/completions"] = {"model": model, "prompt": "def", "max_tokens": 2}
    for name, pid in victims.items():
        os.kill(pid, signal.SIGKILL)
        for path, body in paths.items():
            request = http(f"after {name}", path, json.dumps(body).encode(), key)
            try:
                status = send(address, request)
            except OSError as error:
                outcome.problems.append(f"killed {name}, {path}: {error!r}")
                continue
            outcome.statuses[f"killed {name}: {status}"] += 1
            if status not in ("200", str(BUSY)):  # what the killed process does not concern goes on
                outcome.problems.append(f"killed {name}, {path}: {status}")
    return outcome


def processes_of(server_pid: int) -> dict[int, str]:
    """Processes that a server started, and their command lines."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == server_pid:
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def _shared_memory() -> set[str]:
    """Regions of servers that this process has started."""
    return {path.name for path in SHARED_MEMORY_DIR.glob(f"{PREFIX}-{os.getpid()}-*")}


def _still_running(processes: Mapping[int, str]) -> list[str]:
    """Command lines of those that do not end, though they were told to."""
    deadline = time.monotonic() + END_S
    left = dict(processes)
    while left and time.monotonic() < deadline:
        left = {pid: command for pid, command in left.items() if _state(pid) not in ("", "Z")}
        time.sleep(POLL_INTERVAL_S)
    return list(left.values())


def _state(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


@contextmanager
def public_endpoint(
    repository: Path, models: Sequence[str], scratch: Path
) -> Iterator[tuple[InferenceServer, str, str]]:
    """A server on the repository, the address of the public endpoint before it, and the key that this asks for."""
    key = secrets.token_hex(8)
    keys = scratch / "keys.txt"
    keys.touch(0o600)
    keys.write_text(key)
    with (
        InferenceServer(repository, models, scratch / "server.log", exit_timeout_s=2) as server,
        OpenAIServer(
            server.grpc_address, repository, "127.0.0.1", 0, keys, http_address=server.http_address
        ) as interface,
    ):
        yield server, interface.address, key


def drill(repository: Path, model: str, version: int, requests: int, seed: int) -> Outcome:
    """Fuzz, reload storm, kills; then sees that nothing is left.

    Raises:
        ConfigError: There is no such version.
        ServerError: It cannot be served.
    """
    version_place(repository, model, version)
    models = model_names(model)
    total, before = Outcome(), _shared_memory()
    with tempfile.TemporaryDirectory(prefix="millrace-drill-") as scratch:
        copied = copy_version(repository, models, version, Path(scratch) / "repo")
        with public_endpoint(copied, models, Path(scratch)) as (server, address, key):
            parts = [fuzz(address, server, model, key, requests, seed), reload_storm(address, server, models, key)]
            pid = server.pid
            children = processes_of(pid)
            stub = max(number for number, command in children.items() if "python_backend_stub" in command)
            parts.append(kill_behind(address, model, key, {"a model's process": stub, "the server": pid}))
    for part in parts:
        total.statuses += part.statuses
        total.neighbour_answers += part.neighbour_answers
        total.problems += part.problems
    alive = _still_running(children)
    left = sorted(_shared_memory() - before)
    total.problems += [f"left behind: {name}" for name in alive + left]
    return total


def main(arguments: list[str] | None = None) -> int:
    """Prints what happened; the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="flows.serving.drills.fuzz_drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", type=Path, help="<model repository>/<model name>/<version>")
    parser.add_argument("--requests", type=int, default=10_000, help="how many (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    given = parser.parse_args(arguments)
    place: Path = given.version.absolute()
    try:
        require(place.name.isdigit(), "version", given.version, "names no version", "Give .../<model>/<number>.")
        outcome = drill(place.parents[1], place.parent.name, int(place.name), given.requests, given.seed)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(outcome.lines()))
    print(f"{outcome.statuses.total()} requests and reloads, {len(outcome.problems)} problems")
    return int(bool(outcome.problems))


if __name__ == "__main__":
    sys.exit(main())
