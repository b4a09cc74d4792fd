"""Threads that ask inference servers for text, row by row; a server that is lost loses none of them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import tritonclient.utils  # has no types

from flows.config import ConfigError, RunError
from flows.config.predict import PredictConfig
from flows.serving.client import Client, Completion, Transport

RETRY_S = 0.25
MAX_TRIES = 5
"""A row whose request fails so often, whatever server has it, gets no answer: it may be what ends them."""
Answer = Completion | RunError
"""What a row gets: the model's text, or why there is none."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One request."""

    part: int
    index: int
    """In its part."""
    text: str
    number: int
    """In the file."""
    tries: int = 0
    """Requests that failed so far."""


class ServerTeam:
    """Asks servers for one row per thread at a time.

    Args:
        addresses: gRPC addresses.
        model: Served name of the text model.
        version: Which one.
        config: How many rows at a time, with which settings.
    """

    def __init__(self, addresses: Sequence[str], model: str, version: int, config: PredictConfig) -> None:
        self._model, self._version, self._config = model, str(version), config
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Row, Answer] | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._lost: dict[str, str] = {}
        self._dismissed = False
        self._threads = [
            threading.Thread(target=self._work, args=(address,), daemon=True)
            for address in addresses
            for _ in range(config.requests_per_server)
        ]
        self._at_work = len(self._threads)
        for thread in self._threads:
            thread.start()

    def ask(self, row: Row) -> None:
        """Puts a row in line."""
        self._rows.put(row)

    def answer(self) -> tuple[Row, Answer]:
        """The next answer, whichever row's it is.

        Raises:
            RunError: No server is left.
        """
        answer = self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def dismiss(self) -> None:
        """Lets each thread end after the row that it has."""
        self._dismissed = True
        for _ in self._threads:
            self._rows.put(None)

    def _work(self, address: str) -> None:
        try:
            while not self._dismissed:
                with Client(Transport.grpc, address) as client:
                    failure = self._ask_until_failure(client)
                if failure is not None and not self._is_back(address):
                    self._give_up(address, failure)
                    return
        except Exception as error:  # the caller waits for an answer, whatever happens here
            self._answers.put(error)

    def _ask_until_failure(self, client: Client) -> str | None:
        """Why the connection can no longer be used; None = there is nothing left to ask."""
        while (row := self._rows.get()) is not None and not self._dismissed:
            try:
                while (answer := self._ask(client, row)) is None:  # others ask this server too, and its line is full
                    time.sleep(RETRY_S)
                self._answers.put((row, answer))
            except (tritonclient.utils.InferenceServerException, queue.Empty) as error:
                failure = str(error) or "no answer"
                if row.tries + 1 == MAX_TRIES:
                    self._answers.put((row, RunError(f"asked {MAX_TRIES} times, last: {failure}")))
                else:
                    self._rows.put(replace(row, tries=row.tries + 1))  # for whoever comes first
                return failure
        return None

    def _ask(self, client: Client, row: Row) -> Answer | None:
        """The answer, or None if the server has no room now."""
        config = self._config
        options = {"max_tokens": config.max_tokens, "temperature": config.temperature, "top_p": config.top_p}
        if config.temperature:
            options["seed"] = config.seed + row.number
        try:
            return client.generate(self._model, row.text, version=self._version, options=options)
        except tritonclient.utils.InferenceServerException as error:
            said = str(error.message())  # of a stream's errors the client knows no status
            if ": it must " in said:
                raise ConfigError(f"predict.{said}. Set it so.") from error  # all rows share the settings
            if "wait already" in said:
                return None
            raise

    def _is_back(self, address: str) -> bool:
        """Waits until the server has the model again; whether it did in time."""
        deadline = time.monotonic() + self._config.patience_s
        while time.monotonic() < deadline and not self._dismissed:
            with Client(Transport.grpc, address) as client:
                if _is_ready(client, self._model, self._version):
                    return True
            time.sleep(RETRY_S)
        return False

    def _give_up(self, address: str, reason: str) -> None:
        with self._lock:
            self._at_work -= 1
            if address not in self._lost:
                logger.warning("%s is given up, its rows go to the others: %s", address, reason)
                self._lost[address] = reason
            if not self._at_work:
                reasons = "; ".join(f"{lost}: {why}" for lost, why in self._lost.items())
                self._answers.put(
                    RunError(f"no server is left ({reasons}). What is finished is kept: the same command goes on.")
                )


def _is_ready(client: Client, model: str, version: str) -> bool:
    try:
        return client.is_ready(model, version)
    except tritonclient.utils.InferenceServerException:
        return False
