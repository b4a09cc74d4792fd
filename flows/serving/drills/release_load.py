"""Clients that ask without a pause, over every way in, and count who answered and what failed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from tritonclient.utils import InferenceServerException

from flows.config import RunError
from flows.serving.client import BROKEN, TRANSPORTS, Client, Transport
from flows.serving.repository import model_names

SCORES, TEXT = "scores", "text"
KINDS = [(transport, what) for transport in TRANSPORTS for what in (SCORES, TEXT)]
PROMPTS = ("def main(", "import os\n", "class A:\n    def __init__(self", "return")
NEW_TOKENS = 8
DEADLINE_S = 600.0
FIRST, SECOND = "1", "2"
"""Versions of a drill."""
MAX_REPEATS = 5


class Load:
    """Asks while the `with` block runs; every way in has a client of its own.

    A gRPC stream that breaks before its first piece is asked again by its client, which the proxy cannot do for it.

    Args:
        addresses: `host:port` by transport.
        model_name: Published name.
    """

    def __init__(self, addresses: dict[Transport, str], model_name: str) -> None:
        self.failures: list[str] = []
        """What failed, in the words of the client."""
        self.repeated = 0
        """Streams that their client asked again."""
        self._addresses, self._names = addresses, model_names(model_name)
        self._phase = ""
        self._counts: Counter[tuple[str, Transport, str, str]] = Counter()
        self._done = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._ask, args=kind, daemon=True) for kind in KINDS]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done = True
        for thread in self._threads:
            thread.join()

    def anew(self) -> Load:
        """As many clients more."""
        return Load(self._addresses, self._names[0])

    def enter(self, phase: str) -> None:
        """Counts under this name from now on."""
        with self._changed:
            self._phase = phase

    def answers(self, phase: str) -> Counter[str]:
        """Answers of a phase by version."""
        found: Counter[str] = Counter()
        with self._changed:
            for (name, _, _, version), count in self._counts.items():
                if name == phase:
                    found[version] += count
        return found

    def least(self, phase: str, versions: Sequence[str]) -> int:
        """Answers that these versions gave in a phase, of the way in with the fewest."""
        with self._changed:
            return min(sum(self._counts[phase, *kind, version] for version in versions) for kind in KINDS)

    def wait_until(self, happens: Callable[[], bool], what: str) -> None:
        """Returns once it happens; looks again after every answer.

        Raises:
            RunError: It does not, within `DEADLINE_S`.
        """
        deadline = time.monotonic() + DEADLINE_S
        while not happens():
            with self._changed:
                self._changed.wait(1.0)
            if time.monotonic() > deadline:
                raise RunError(f"the drill waited {DEADLINE_S:.0f} s in vain: {what}. Failures: {self.failures[:3]}")

    def _ask(self, transport: Transport, what: str) -> None:
        with Client(transport, self._addresses[transport]) as client:
            number = 0
            while not self._done:
                number += 1
                try:
                    version = self._one(client, what, number)
                except Exception as error:  # whatever a client can meet is a failed request
                    with self._changed:
                        self.failures.append(f"{self._phase}, {transport} {what}: {error}")
                        self._changed.notify_all()
                    continue
                with self._changed:
                    self._counts[self._phase, transport, what, version] += 1
                    self._changed.notify_all()

    def _one(self, client: Client, what: str, number: int) -> str:
        scores, text = self._names
        if what == SCORES:
            ids = np.array([[1, 2, 3]], dtype=np.int64)
            return client.answering_version(scores, ids, np.ones_like(ids))
        for repeats in range(MAX_REPEATS + 1):
            try:
                prompt = PROMPTS[number % len(PROMPTS)]
                return client.generate(text, prompt, options={"max_tokens": NEW_TOKENS}).version
            except InferenceServerException as error:
                if client.transport is not Transport.grpc or error.status() != BROKEN or repeats == MAX_REPEATS:
                    raise
                with self._changed:
                    self.repeated += 1
        raise AssertionError


def has_answered(load: Load, phase: str, requests: int) -> bool:
    """Whether a phase has brought so many answers over every way in."""
    return load.least(phase, [FIRST, SECOND]) >= requests
