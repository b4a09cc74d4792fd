"""Release drill: two versions, live load, publish -> canary -> promote -> rollback, then servers and models are killed.

python -m flows.serving.release_drill model_repo quickstart --replicas 2

Works on a copy (links) of the newest version, which becomes version 1, and again version 2; the repository is not
touched. Clients ask for scores and text over HTTP and gRPC without a pause. Prints who answered in each phase, the
share of the canary as measured, and how many requests failed: none may.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flows.config import ConfigError, RunError
from flows.config.serving import ServeConfig
from flows.serving import promotion
from flows.serving.client import Transport
from flows.serving.release_load import Load
from flows.serving.releases import record_published
from flows.serving.replica import Replica
from flows.serving.replicas import ReplicatedServer
from flows.serving.repository import CONFIG, complete_versions, lock_repository, model_names

LOOK_INTERVAL_S = 0.2
SIGMAS = 5
"""The measured share of a canary lies within so many standard deviations of the configured one."""
FIRST, SECOND = "1", "2"


def run(repository: Path, model_name: str, *, replicas: int = 2, share: float = 0.2, requests: int = 20) -> None:
    """Runs the drill and prints what it saw.

    Args:
        repository: Model repository.
        model_name: Published name.
        replicas: Servers of the live version.
        share: Of the canary.
        requests: Least answers of every way in, in each phase.

    Raises:
        ConfigError: No such model was published.
        RunError: A request failed, the canary's share was another one, or something did not happen.
    """
    versions = complete_versions(repository, model_name)
    if not versions:
        raise ConfigError(f"publish.model_name={model_name} has no version in {repository}. Publish one first.")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "repository"
        place(repository, copy, model_name, versions[-1], 1, live=True)
        with serving(copy, Path(scratch), replicas) as service, load_on(service, model_name) as load:
            release(
                load,
                service,
                lambda: place(repository, copy, model_name, versions[-1], 2, live=False),
                copy,
                model_name,
                share,
                requests,
            )
            faults(load, service, requests)
        print(f"failed: {len(load.failures)}; streams that their clients asked again: {load.repeated}")
    if load.failures:
        raise RunError(f"{len(load.failures)} requests failed, the first: {load.failures[0]}")


def place(source: Path, repository: Path, model_name: str, version: int, number: int, *, live: bool) -> None:
    """Puts links to a published version into another repository, under a number of its own."""
    repository.mkdir(exist_ok=True)
    with lock_repository(repository):
        for name in model_names(model_name):
            for path in (source / name).iterdir():
                if path.name in (CONFIG, "configs", "warmup") and not (repository / name / path.name).exists():
                    (repository / name).mkdir(exist_ok=True)
                    copy = shutil.copytree if path.is_dir() else shutil.copyfile
                    copy(path, repository / name / path.name)
            shutil.copytree(source / name / str(version), repository / name / str(number), copy_function=os.link)
        record_published(repository, model_name, number, live=live)


@contextmanager
def serving(repository: Path, scratch: Path, replicas: int) -> Iterator[ReplicatedServer]:
    """Replicas on free ports, and a thread that looks after them."""
    options = ServeConfig(http_port=0, grpc_port=0, metrics_port=0, replicas=replicas)
    (scratch / "runtime").mkdir()
    with ReplicatedServer(repository, options, scratch / "logs", scratch / "runtime") as service:
        done = threading.Event()

        def look() -> None:
            while not done.wait(LOOK_INTERVAL_S):
                service.look()

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield service
        finally:
            done.set()
            thread.join()


def load_on(service: ReplicatedServer, model_name: str) -> Load:
    """Clients of a service."""
    return Load({Transport.http: service.http_address, Transport.grpc: service.grpc_address}, model_name)


def release(
    load: Load,
    service: ReplicatedServer,
    publish: Callable[[], object],
    repository: Path,
    model_name: str,
    share: float,
    requests: int,
) -> None:
    """Takes version 2 through its whole life while the load runs, and prints each phase."""

    def phase(name: str, versions: list[str]) -> None:
        load.enter(name)
        load.wait_until(lambda: load.least(name, versions) >= requests, name)
        told = ", ".join(f"version {version}: {count}" for version, count in sorted(load.answers(name).items()))
        print(f"{name:<32}{told}", flush=True)

    def settled(name: str, version: str) -> None:
        """Until only this version answers: as many times over every way in as there are servers to reload, twice."""
        least = 2 * len(service.replicas)
        for number in itertools.count():
            attempt = f"{name}, try {number}"
            load.enter(attempt)
            load.wait_until(partial(_has_answered, load, attempt, least), name)
            if set(load.answers(attempt)) == {version}:
                return

    phase("version 1 live", [FIRST])
    publish()
    phase("version 2 published", [FIRST])
    promotion.canary(repository, model_name, share)
    load.enter("canary starts")
    load.wait_until(lambda: bool(load.answers("canary starts")[SECOND]), "version 2 never answered")
    phase(f"canary with share {share:g}", [FIRST, SECOND])
    check_share(load, f"canary with share {share:g}", share)
    promotion.promote(repository, model_name)
    settled("promote", SECOND)
    phase("version 2 promoted", [SECOND])
    promotion.rollback(repository, model_name)
    settled("rollback", FIRST)
    phase("version 1 live again", [FIRST])


def check_share(load: Load, phase: str, share: float) -> None:
    """Compares the measured share with the configured one, by the spread that chance gives it.

    Raises:
        RunError: They differ by more.
    """
    answers = load.answers(phase)
    total = sum(answers.values())
    measured, spread = answers[SECOND] / total, math.sqrt(share * (1 - share) / total)
    print(f"{'':<32}share measured {measured:.3f}, configured {share:g}, {SIGMAS} sigma = {SIGMAS * spread:.3f}")
    if abs(measured - share) > SIGMAS * spread:
        raise RunError(f"the canary answered {measured:.3f} of {total} requests, not {share:g}.")


def faults(load: Load, service: ReplicatedServer, requests: int) -> None:
    """Kills a model's process, a server, and a rank where a model is split, and prints what clients saw of it."""
    victims: dict[str, Callable[[Replica], None]] = {
        "kill -9 of a model's process": lambda replica: os.kill(model_process(replica), signal.SIGKILL),
        "kill -9 of a server": lambda replica: os.kill(server_of(replica), signal.SIGKILL),
    }
    if ranks(service.replicas[0]):
        victims["kill -9 of a rank"] = lambda replica: os.kill(ranks(replica)[0], signal.SIGKILL)
    for number, (name, kill) in enumerate(victims.items()):
        replica = service.replicas[number % len(service.replicas)]
        before, failed = replica.restarts, len(load.failures)
        load.enter(name)
        kill(replica)
        load.wait_until(partial(_is_back, replica, before), f"{replica.name} did not come back after {name}")
        load.wait_until(partial(_has_answered, load, name, requests), name)
        print(f"{name:<32}{sum(load.answers(name).values())} answers, {len(load.failures) - failed} failed", flush=True)


def _is_back(replica: Replica, restarts: int) -> bool:
    return replica.restarts > restarts and replica.server is not None


def _has_answered(load: Load, phase: str, requests: int) -> bool:
    return load.least(phase, [FIRST, SECOND]) >= requests


def model_process(replica: Replica) -> int:
    """Process id of one of the models' processes of a replica."""
    from flows.serving.deaths import model_processes

    return next(pid for pid in model_processes(server_of(replica)) if pid not in ranks(replica))


def ranks(replica: Replica) -> list[int]:
    """Process ids of the ranks of a replica's split models."""
    from flows.serving.deaths import IS_RANK, model_processes

    found = model_processes(server_of(replica)).items()
    return [pid for pid, (_, instance) in found if instance.startswith(IS_RANK)]


def server_of(replica: Replica) -> int:
    """Process id of a replica's server."""
    assert replica.server is not None
    return replica.server.pid


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("model_name")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--requests", type=int, default=100, help="least answers of every way in, in each phase")
    words = parser.parse_args()
    try:
        run(words.repository, words.model_name, replicas=words.replicas, share=words.share, requests=words.requests)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
