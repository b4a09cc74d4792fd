"""Servers of a service that die or hang while clients ask, and what these see of it: parts of the release drill."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial

from flows.config import RunError
from flows.config.serving import ServeConfig
from flows.serving.drills.release_load import SCORES, TEXT, Load, has_answered
from flows.serving.replicas.deaths import IS_RANK, model_processes
from flows.serving.replicas.replica import Replica
from flows.serving.replicas.service import ReplicatedServer

Fault = tuple[str, Callable[[Replica], int], signal.Signals]
"""What it is called, which process it happens to, and what that is sent."""


def faults(
    load: Load, service: ReplicatedServer, requests: int, probe_timeout_s: float, chosen: Sequence[Fault] = ()
) -> None:
    """Kills a model's process and a server, then stops one of each so that it hangs, and kills a rank where a model is
    split; prints what the clients saw.

    A request that was sent to a hung server waits until that is found out; then the proxy repeats it elsewhere.

    Args:
        load: Clients of the service.
        service: Two replicas or more.
        requests: Least answers over every way in, in each phase.
        probe_timeout_s: Of the service: a server that answers no inference for so long counts as hung.
        chosen: What happens to whom; empty = everything.

    Raises:
        RunError: A fault was found out later than the probes of all models, one after the other, take.
    """
    known_after_s = ServeConfig.probe_interval_s + probe_timeout_s * len((SCORES, TEXT))
    all_of_them = (*FAULTS, OF_A_RANK) if ranks(service.replicas[0]) else FAULTS
    for number, (name, victim, what) in enumerate(chosen or all_of_them):
        replica = service.replicas[number % len(service.replicas)]
        load.wait_until(partial(_serves, replica), f"{replica.name} does not serve")
        before, failed = replica.restarts, len(load.failures)
        load.enter(name)
        began = time.monotonic()
        os.kill(victim(replica), what)
        told = _ask_anew(load, service, replica) if (victim, what) == HANG else ""
        load.wait_until(partial(_is_replaced, replica, before), f"{replica.name} was not killed after {name}")
        seconds = time.monotonic() - began
        load.wait_until(partial(_is_back, replica, before), f"{replica.name} did not come back after {name}")
        load.wait_until(partial(has_answered, load, name, requests), name)
        told = f"killed after {seconds:.1f} s{told}; {sum(load.answers(name).values())} answers"
        print(f"{name:<32}{told}, {len(load.failures) - failed} failed", flush=True)
        if seconds > known_after_s:
            raise RunError(f"{name}: it was found out after {seconds:.1f} s, later than {known_after_s:g} s.")


def _ask_anew(load: Load, service: ReplicatedServer, replica: Replica) -> str:
    """Lets clients come once a hung server gets no more requests; how they fared until it was killed."""
    began, restarts = time.monotonic(), replica.restarts
    load.wait_until(lambda: replica.name not in service.proxy.in_rotation(), f"{replica.name} gets requests still")
    seconds = time.monotonic() - began
    with load.anew() as others:
        others.wait_until(partial(_is_replaced, replica, restarts), f"{replica.name} was not killed")
        answers = sum(others.answers("").values())
    load.failures += others.failures
    return f", without new requests after {seconds:.1f} s, {answers} answers to other clients from then on"


def _is_replaced(replica: Replica, restarts: int) -> bool:
    return replica.restarts > restarts


def _serves(replica: Replica) -> bool:
    return replica.server is not None


def _is_back(replica: Replica, restarts: int) -> bool:
    return _is_replaced(replica, restarts) and _serves(replica)


def model_process(replica: Replica) -> int:
    """Process id of one of the models' processes of a replica."""
    return next(pid for pid in model_processes(server_of(replica)) if pid not in ranks(replica))


def rank(replica: Replica) -> int:
    """Process id of a rank of a replica's split model."""
    return ranks(replica)[0]


def ranks(replica: Replica) -> list[int]:
    """Process ids of the ranks of a replica's split models."""
    found = model_processes(server_of(replica)).items()
    return [pid for pid, (_, instance) in found if instance.startswith(IS_RANK)]


def server_of(replica: Replica) -> int:
    """Process id of a replica's server."""
    assert replica.server is not None
    return replica.server.pid


HANG = (server_of, signal.SIGSTOP)
FAULTS: tuple[Fault, ...] = (
    ("kill -9 of a model's process", model_process, signal.SIGKILL),
    ("kill -9 of a server", server_of, signal.SIGKILL),
    ("a model's process hangs", model_process, signal.SIGSTOP),
    ("a server hangs", *HANG),
)
"""What happens to whom."""
OF_A_RANK: Fault = ("kill -9 of a rank", rank, signal.SIGKILL)
