"""Sends a server no more requests while it is not known whether it hangs or is only slow."""

from __future__ import annotations

import logging
import re
import threading
import urllib.request
from types import TracebackType
from typing import Self

from flows.serving.replicas.proxy import Proxy
from flows.serving.server import InferenceServer

logger = logging.getLogger(__name__)

COUNTERS = ("nv_inference_count", "nv_inference_exec_count", "millrace_steps_total")
"""Of a server's metrics, those that grow as long as a model gets on with its work."""


class Suspicion:
    """Watches a server while the `with` block asks it for an inference.

    A server that is busy answers late, too, but its counters grow. One whose counters stand still is taken out of the
    proxy's rotation, as long as another one is in it, and put back once the block ends with an answer. What it has
    already been sent waits: whether it is killed is for the one who asks.

    Args:
        proxy: Knows who is in rotation.
        name: Of the replica.
        server: Its server.
        model: The one that is asked.
        patience_s: Seconds without an answer until its counters are looked at, and between two looks.
    """

    def __init__(self, proxy: Proxy, name: str, server: InferenceServer, model: str, patience_s: float) -> None:
        self._proxy, self._name, self._server, self._model = proxy, name, server, model
        self._patience_s = patience_s
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._is_out = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended.set()
            if self._is_out and error is None:
                self._proxy.switch_on(self._name, self._server)
                logger.warning("%s has answered and gets requests again", self._name)

    def _watch(self) -> None:
        if self._ended.wait(self._patience_s):
            return
        before = self._work_done()
        if self._ended.wait(self._patience_s) or self._work_done() != before:
            return
        with self._lock:
            if not self._ended.is_set() and self._proxy.in_rotation() - {self._name}:
                self._is_out = True
                self._proxy.switch_off(self._name)
                logger.warning("%s gets no new requests: %s makes no progress", self._name, self._model)

    def _work_done(self) -> list[str]:
        """The model's counters; none if the server does not tell them in time."""
        try:
            with urllib.request.urlopen(
                f"http://{self._server.metrics_address}/metrics", timeout=self._patience_s
            ) as told:
                lines = told.read().decode().splitlines()
        except OSError:
            return []
        mine = re.compile(rf'({"|".join(COUNTERS)})\{{.*model="{re.escape(self._model)}"')
        return [line for line in lines if mine.match(line)]
