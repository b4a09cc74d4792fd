"""Release drill: two versions, live load, publish -> canary -> promote -> rollback, then a storm of promotions.

python -m flows.serving.drills.release_drill model_repo quickstart --replicas 2

Works on a copy (links) of the newest version, which becomes version 1, and again version 2; the repository is not
touched. Clients ask for scores and text over HTTP and gRPC without a pause, also while models' processes and servers
are killed, and stopped (SIGSTOP), as if they hung. Prints who answered in each phase, the share of the canary as
measured, how long a hung server kept its place, and how many requests failed: none may.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flows.config import ConfigError, RunError
from flows.config.serving import ServeConfig
from flows.serving.client import Transport
from flows.serving.drills.release_load import FIRST, SECOND, Load, has_answered
from flows.serving.drills.server_faults import faults
from flows.serving.releases import promotion
from flows.serving.releases.state import record_published
from flows.serving.replicas.service import ReplicatedServer
from flows.serving.repository import CONFIG, complete_versions, lock_repository, model_names

LOOK_INTERVAL_S = 0.2
PROBE_TIMEOUT_S = 30.0
STORM = 40
"""Changes of the live version, one right after the other."""
SIGMAS = 5
"""The measured share of a canary lies within so many standard deviations of the configured one."""


def run(
    repository: Path,
    model_name: str,
    *,
    replicas: int = 2,
    share: float = 0.2,
    requests: int = 20,
    probe_timeout_s: float = PROBE_TIMEOUT_S,
) -> None:
    """Runs the drill and prints what it saw.

    Args:
        repository: Model repository.
        model_name: Published name.
        replicas: Servers of the live version.
        share: Of the canary.
        requests: Least answers of every way in, in each phase.
        probe_timeout_s: Seconds after which a server that answers no inference counts as hung.

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
        with serving(copy, Path(scratch), replicas, probe_timeout_s) as service, load_on(service, model_name) as load:
            release(
                load,
                service,
                lambda: place(repository, copy, model_name, versions[-1], 2, live=False),
                copy,
                model_name,
                share,
                requests,
            )
            storm(load, service, copy, model_name, requests)
            faults(load, service, requests, probe_timeout_s)
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
def serving(
    repository: Path, scratch: Path, replicas: int, probe_timeout_s: float = PROBE_TIMEOUT_S
) -> Iterator[ReplicatedServer]:
    """Replicas on free ports, and a thread that looks after them."""
    options = ServeConfig(http_port=0, grpc_port=0, metrics_port=0, replicas=replicas, probe_timeout_s=probe_timeout_s)
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

    phase("version 1 live", [FIRST])
    publish()
    phase("version 2 published", [FIRST])
    promotion.canary(repository, model_name, share)
    load.enter("canary starts")
    load.wait_until(lambda: bool(load.answers("canary starts")[SECOND]), "version 2 never answered")
    phase(f"canary with share {share:g}", [FIRST, SECOND])
    check_share(load, f"canary with share {share:g}", share)
    promotion.promote(repository, model_name)
    settle(load, service, "promote", SECOND)
    phase("version 2 promoted", [SECOND])
    promotion.rollback(repository, model_name)
    settle(load, service, "rollback", FIRST)
    phase("version 1 live again", [FIRST])


def settle(load: Load, service: ReplicatedServer, name: str, version: str) -> None:
    """Returns once only this version answers: over every way in twice as many times as there are servers to reload."""
    least = 2 * len(service.replicas)
    for number in itertools.count():
        attempt = f"{name}, try {number}"
        load.enter(attempt)
        load.wait_until(partial(has_answered, load, attempt, least), name)
        if set(load.answers(attempt)) == {version}:
            return


def storm(load: Load, service: ReplicatedServer, repository: Path, model_name: str, requests: int) -> None:
    """Promotes version 2 and goes back to version 1 again and again, whether servers have followed or not."""
    name, failed = f"storm of {STORM} changes", len(load.failures)
    load.enter(name)
    for number in range(STORM // 2):
        promotion.promote(repository, model_name, version=int(SECOND), why=f"storm, {number}")
        load.wait_until(partial(has_answered, load, name, 2 * number + 1), name)
        promotion.rollback(repository, model_name, why=f"storm, {number}")
        load.wait_until(partial(has_answered, load, name, 2 * number + 2), name)
    load.wait_until(partial(has_answered, load, name, requests), name)
    told = ", ".join(f"version {version}: {count}" for version, count in sorted(load.answers(name).items()))
    settle(load, service, "after the storm", FIRST)
    print(f"{name:<32}{told}, {len(load.failures) - failed} failed", flush=True)


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("model_name")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--requests", type=int, default=100, help="least answers of every way in, in each phase")
    parser.add_argument("--probe-timeout-s", type=float, default=PROBE_TIMEOUT_S, help="when a server counts as hung")
    words = vars(parser.parse_args())
    try:
        run(words.pop("repository"), words.pop("model_name"), **words)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
