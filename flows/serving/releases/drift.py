"""Asks servers, again and again, what a version's passport recorded, and tells Prometheus how far they are off.

Whatever changed since the proof, a served file, the runtime, the processor, or the version that answers who names none,
shows as a ratio above 1: the largest difference over what the passport allows.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from tritonclient.utils import InferenceServerException

from flows.serving.ports import port_error
from flows.serving.probe import BUSY
from flows.serving.proof.recorded_samples import RECORDED, scores_drift, text_drift
from flows.serving.releases.state import live_versions
from flows.serving.repository import PASSPORT, model_names

logger = logging.getLogger(__name__)

RATIO = "millrace_drift_ratio"
SECOND_LOOK_S = 5.0
"""A difference is looked at again so soon: the server may just be switching to another version."""
STOP_S = 2.0
"""The way out waits so long for an answer: a server that hangs must not hold it up."""
Ratios = Mapping[tuple[str, str, str], float]
"""By model, live version and server."""
Drift = Callable[[str, str, Mapping[str, Any]], float]


class DriftWatch:
    """Measures, from a thread of its own, how far servers have drifted, while the `with` block runs.

    Args:
        repository: Model repository.
        addresses: `host:port` of the HTTP endpoints of the live version's servers by name, as they are at the moment.
        host: Address to bind.
        port: Where Prometheus finds the ratios; 0 = any free one.
        interval_s: Seconds between two rounds.

    Raises:
        ConfigError: The port is taken.
    """

    def __init__(
        self,
        repository: Path,
        addresses: Callable[[], Mapping[str, str]],
        host: str,
        port: int,
        interval_s: float,
    ) -> None:
        self._repository, self._addresses, self._interval_s = repository, addresses, interval_s
        self._ratios: Ratios = {}
        self._told: set[tuple[str, int]] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="drift", daemon=True)
        registry = CollectorRegistry()
        try:
            self._endpoint, _ = start_http_server(port, host, registry)
        except OSError as error:
            raise port_error("drift_port", port, host, error) from error
        registry.register(self)
        self.address = f"{f'[{host}]' if ':' in host else host}:{self._endpoint.server_port}"
        """`host:port` of the metrics."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._endpoint.shutdown()
        self._endpoint.server_close()
        self._thread.join(STOP_S)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What Prometheus is told."""
        description = "Largest difference from the passport's samples over what the passport allows"
        family = GaugeMetricFamily(RATIO, description, labels=["model", "version", "server"])
        for labels, ratio in sorted(self._ratios.items()):
            family.add_metric(labels, ratio)
        yield family

    def look(self) -> Ratios:
        """One round: every published model of every server; not a number where nothing can be measured."""
        ratios = {}
        for name, version in live_versions(self._repository).items():
            recorded = self._recorded(name, version)
            for server, address in self._addresses().items():
                for model, drift in zip(model_names(name), (scores_drift, text_drift), strict=True):
                    key = (model, str(version), server)
                    ratios[key] = math.nan if recorded is None else self._measure(key, drift, address, recorded)
        for (model, live, server), ratio in ratios.items():
            if ratio > 1 and not self._ratios.get((model, live, server), 0.0) > 1:
                told = "%s of %s does not answer as the passport of version %s says: %.3g of what it allows."
                logger.error(told, model, server, live, ratio)
        self._ratios = ratios
        return ratios

    def _measure(self, key: tuple[str, str, str], drift: Drift, address: str, recorded: Mapping[str, Any]) -> float:
        try:
            return drift(address, key[0], recorded)
        except urllib.error.HTTPError as error:
            if error.code == BUSY:  # enough texts wait: what was known of it still holds
                return self._ratios.get(key, math.nan)
            return math.inf
        except InferenceServerException:
            return math.inf
        except OSError:  # it is being started again
            return math.nan

    def _watch(self) -> None:
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            try:
                is_off = any(ratio > 1 for ratio in self.look().values())
            except Exception as error:  # whatever it is, the watch must not end in silence
                logger.error("Drift cannot be measured: %r", error)
                self._ratios, is_off = dict.fromkeys(self._ratios, math.nan), False
            wait_s = min(SECOND_LOOK_S, self._interval_s) if is_off else self._interval_s

    def _recorded(self, name: str, version: int) -> Mapping[str, Any] | None:
        path = self._repository / name / str(version) / PASSPORT
        passport = json.loads(path.read_text()) if path.is_file() else {}
        if RECORDED not in passport and (name, version) not in self._told:
            self._told.add((name, version))
            logger.warning(
                "%s version %s has %s: its drift is not watched. Publish it again.",
                name,
                version,
                "a passport from before they held samples" if passport else "no passport, so that nothing proves it",
            )
        recorded: Mapping[str, Any] | None = passport.get(RECORDED)
        return recorded
