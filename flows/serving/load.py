"""Clients that each ask again as soon as they are answered, on a connection that stays open, and what they saw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from flows.serving.client import Client, Completion

Connection = TypeVar("Connection")
Request = TypeVar("Request")


@dataclass
class Load:
    """What a number of clients saw."""

    seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)
    """Of each answer."""
    first_ms: list[float] = field(default_factory=list)
    """Until the first piece of each answer."""
    between_ms: list[float] = field(default_factory=list)
    """Between two pieces of an answer."""
    whole_ms: list[float] = field(default_factory=list)
    """Until each answer was complete."""

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together."""
        return sum(self.tokens) / self.seconds

    @property
    def answers_per_s(self) -> float:
        """Of all clients together."""
        return len(self.tokens) / self.seconds


def under_load(
    clients: int,
    requests: Iterable[Request],
    connect: Callable[[], AbstractContextManager[Connection]],
    ask: Callable[[Connection, Request, Load], object],
) -> Load:
    """Lets `clients` threads ask until there are no more requests.

    Args:
        clients: Requests at the same time.
        requests: May be endless, or end when its time is over.
        connect: Opens a client's connection.
        ask: Asks one on it and notes in the load what it saw.

    Raises:
        Exception: Whatever the first failed request raised.
    """
    load, waiting, lock = Load(), iter(requests), threading.Lock()
    none_left = object()

    def client(_: int) -> None:
        with connect() as connection:
            while True:
                with lock:
                    request = next(waiting, none_left)
                if request is none_left:
                    return
                ask(connection, request, load)  # type: ignore[arg-type]

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    load.seconds = time.perf_counter() - started
    return load


def ask_text(client: Client, model: str, prompt: str, max_tokens: int, load: Load) -> str:
    """One text, streamed; notes its waits, which are single list operations and need no lock.

    Args:
        client: To the server.
        model: Name of the text model.
        prompt: Beginning of the text.
        max_tokens: Most new tokens.
        load: Where its waits are noted.
    """
    pieces: list[Completion] = []
    started = last = time.perf_counter()
    for piece in client.stream(model, prompt, options={"max_tokens": max_tokens}):
        now = time.perf_counter()
        (load.between_ms if pieces else load.first_ms).append(1e3 * (now - last))
        last = now
        pieces.append(piece)
    load.whole_ms.append(1e3 * (last - started))
    load.tokens.append(pieces[-1].completion_tokens)
    return "".join(piece.text for piece in pieces)
