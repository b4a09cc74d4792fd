"""Watches a version under canary and takes it back when it answers wrongly, fails, or is slow.

Wrongly: scores that its server gives for made-up inputs differ from those of the version's own program, whose equality
with the trained model its passport proves, by more than the passport's tolerance. Failing and slow: against the live
version, on the same traffic, in the same time, from the proxy's count of HTTP errors and the servers' own counters,
which know the time of every request but no errors that a model answers with.
"""

from __future__ import annotations

import json
import logging
import threading
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tritonclient.utils import InferenceServerException

from flows.config.canary import CanaryConfig
from flows.export.runtime import Program
from flows.serving.client import Client, Transport
from flows.serving.installation import ServerError
from flows.serving.proof.recorded_samples import LONGEST_SAMPLE_TOKENS, RECORDED, scores_drift
from flows.serving.releases.promotion import abort
from flows.serving.releases.served_view import Pool
from flows.serving.releases.state import ReleaseError
from flows.serving.repository import PASSPORT, model_names
from flows.serving.server import InferenceServer

logger = logging.getLogger(__name__)

WHO = "flows.serve"


@dataclass(frozen=True)
class Answers:
    """What one version answered so far."""

    requests: int = 0
    errors: int = 0
    seconds: float = 0.0
    """Time in the server, of those that were no errors."""

    def __add__(self, other: Answers) -> Answers:
        return Answers(self.requests + other.requests, self.errors + other.errors, self.seconds + other.seconds)

    def since(self, before: Answers) -> Answers:
        """What came since."""
        requests, errors = self.requests - before.requests, self.errors - before.errors
        if requests < 0:  # a server was started again meanwhile and counts from zero
            return self
        return Answers(requests, errors, self.seconds - before.seconds)

    @property
    def error_share(self) -> float:
        """Errors among all requests."""
        return self.errors / max(1, self.requests)

    @property
    def mean_s(self) -> float:
        """Mean time of a request in the server."""
        return self.seconds / max(1, self.requests - self.errors)


class Samples:
    """Compares what a server answers with what the version's own program computes, or its passport recorded.

    A program that is split over ranks is too large to be run here beside it: of that one the passport tells.

    Args:
        repository: Model repository.
        model_name: Published name.
        version: Its version.
        number: Inputs in each comparison.
    """

    def __init__(self, repository: Path, model_name: str, version: int, number: int) -> None:
        place = repository / model_name / str(version)
        self._model_name, self._version, self._number = model_name, version, number
        self._passport = json.loads((place / PASSPORT).read_text())
        self._tolerance: float = self._passport["tolerance"]
        settings = json.loads((place / "settings.json").read_text())
        self._length = min(LONGEST_SAMPLE_TOKENS, settings["sequence_length"])
        self._random = np.random.default_rng()
        self._program = None if settings["pipeline_stages"] > 1 else Program(place, threads=1)
        if self._program is None:
            return
        one = np.zeros((1, 1), dtype=np.int64)
        self._vocab_size = self._program.next_token_scores(one, np.ones_like(one)).shape[1]

    def drift(self, server: InferenceServer) -> str:
        """What is wrong with the scores that a server gives; empty if nothing is."""
        if self._program is None:
            return self._recorded_drift(server)
        with Client(Transport.http, server.http_address) as client:
            for number in range(self._number):
                length = 1 + number * (self._length - 1) // max(1, self._number - 1)
                ids = self._random.integers(0, self._vocab_size, (1, length))
                mask = np.ones_like(ids)
                expected = self._program.next_token_scores(ids, mask)
                try:
                    served = client.scores(self._model_name, ids, mask, str(self._version))
                except (InferenceServerException, OSError) as error:
                    return f"it cannot answer a sample of {length} tokens: {error}"
                worst = float(np.abs(served - expected).max())
                if not worst <= self._tolerance:
                    return (
                        f"served scores of {length} tokens differ from those of its program by {worst:.3g}; "
                        f"its passport allows {self._tolerance:.3g}"
                    )
        return ""

    def _recorded_drift(self, server: InferenceServer) -> str:
        recorded = self._passport[RECORDED]
        try:
            times = scores_drift(server.http_address, self._model_name, recorded, str(self._version))
        except (InferenceServerException, OSError) as error:
            return f"it cannot answer a sample that its passport recorded: {error}"
        allowed = "times what its passport allows"
        return "" if times <= 1 else f"served scores differ from those of the checkpoint by {times:.3g} {allowed}"


def judge(candidate: Answers, live: Answers, config: CanaryConfig) -> str:
    """Why the candidate has to go, by what both answered in the same time; empty if it may stay."""
    if min(candidate.requests, live.requests) < config.min_requests:
        return ""
    if candidate.error_share - live.error_share > config.max_error_share:
        return (
            f"{candidate.errors} of its {candidate.requests} requests failed, {live.errors} of {live.requests} of the "
            f"live version's; serve.canary.max_error_share={config.max_error_share:g} more are allowed"
        )
    if candidate.mean_s > config.max_latency_ratio * live.mean_s > 0:
        return (
            f"its requests take {candidate.mean_s * 1e3:.1f} ms, the live version's {live.mean_s * 1e3:.1f} ms; "
            f"serve.canary.max_latency_ratio={config.max_latency_ratio:g}"
        )
    return ""


def counted(server: InferenceServer, model: str, version: int) -> Answers:
    """What a server's counters say about one version of a model."""
    url = f"http://{server.http_address}/v2/models/{model}/versions/{version}/stats"
    with urllib.request.urlopen(url, timeout=60) as response:
        (row,) = json.loads(response.read())["model_stats"]
    good, bad = row["inference_stats"]["success"], row["inference_stats"]["fail"]
    return Answers(good["count"] + bad["count"], bad["count"], good["ns"] / 1e9)


class CanaryWatch:
    """Judges the version under canary again and again, from a thread of its own, while the `with` block runs.

    Args:
        repository: Model repository.
        model_name: Published name of the model under canary.
        version: The candidate.
        live: The version that it is compared with.
        servers: The candidate's server and those of the live version, as they are at the moment.
        answers: HTTP requests that a pool has answered so far, and how many of them with an error of the server's.
        config: Intervals and limits.
    """

    def __init__(
        self,
        repository: Path,
        model_name: str,
        version: int,
        live: int,
        servers: Callable[[], tuple[InferenceServer | None, Sequence[InferenceServer]]],
        answers: Callable[[Pool], tuple[int, int]],
        config: CanaryConfig,
    ) -> None:
        self._repository, self._model_name, self._config = repository, model_name, config
        self._versions, self._servers, self._answers = (version, live), servers, answers
        self._samples = Samples(repository, model_name, version, config.samples)
        self._before: dict[str, tuple[Answers, Answers]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(self._config.check_interval_s):
            if why := self._breach():
                version = self._versions[0]
                try:
                    abort(self._repository, self._model_name, why=why, who=WHO, version=version)
                except ReleaseError:  # somebody was faster
                    return
                logger.error("%s version %s is taken back: %s.", self._model_name, version, why)
                return

    def _breach(self) -> str:
        candidate, live = self._servers()
        if candidate is None:
            return ""  # it is being started again; its share goes to the live servers
        if why := self._samples.drift(candidate):
            return why if self._servers()[0] is candidate else ""  # a server that died is another matter
        for model in model_names(self._model_name):
            try:
                now = (
                    counted(candidate, model, self._versions[0]),
                    sum((counted(server, model, self._versions[1]) for server in live), Answers()),
                )
            except OSError:  # a server is being started again
                continue
            if why := self._compare(model, *now):
                return why
        try:
            return self._compare("HTTP", Answers(*self._answers(Pool.candidate)), Answers(*self._answers(Pool.live)))
        except ServerError:  # the proxy is being started again
            return ""

    def _compare(self, what: str, candidate: Answers, live: Answers) -> str:
        before = self._before.setdefault(what, (candidate, live))
        why = judge(candidate.since(before[0]), live.since(before[1]), self._config)
        return why and f"{what}: {why}"
