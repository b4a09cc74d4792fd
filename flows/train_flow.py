"""The chain as a Prefect flow, a task for each stage: what `flows.train` runs here, and a deployment when it is due."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import cast
from uuid import UUID

from prefect import flow, task
from prefect._internal.control_listener import get_intent  # the only place that tells a cancelled run from SIGTERM
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.exceptions import Pause, TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.states import AwaitingRetry, Completed, Failed

from flows.artifact import Artifact, ArtifactStore, Stage, full_disk_said
from flows.chain import ChainResult, run_chain
from flows.compose import compose_config
from flows.config import Config, ConfigError, RunError, to_json
from flows.config.serving import NO_CANDIDATE
from flows.join import lead
from flows.launcher import Preempted, treat_as_preemption
from flows.preflight import check
from flows.run_record import RunRecord, report_path, run_dir
from flows.show_in_prefect import show_in_prefect

PREEMPTED = "Preempted"
"""Name of the state of a stage or run that was stopped by SIGTERM."""
logger = logging.getLogger("flows")


@task(cache_policy=NO_CACHE)
def run_stage(stage: Stage, store: ArtifactStore, found: Artifact | None) -> State[Artifact]:
    """One library call. The artifact store is the cache: Prefect is told Cached once the bytes have been verified."""
    if found is not None:
        return Completed(name="Cached", message="its artifact exists and verifies", data=found)
    try:
        return Completed(data=store.make(stage))
    except Preempted as stop:
        return Failed(name=PREEMPTED, message=f"{stage.name}: {stop}")
    except (RunError, ConfigError) as error:
        return Failed(message=f"{stage.name}: {error}")  # worded for the user: a traceback would bury it


@flow(name="train", validate_parameters=False)
def train(overrides: Sequence[str] = (), config: Config | None = None) -> State[None]:
    """Runs the chain.

    Args:
        overrides: What a command line would say, composed when the run starts; for deployments.
        config: A configuration that has been composed and checked already; wins over `overrides`.
    """
    logger.setLevel(logging.INFO)
    try:
        if config is None:
            config = compose_config(overrides)
            check(config)
        treat_as_preemption(_asks_for_checkpoint)
        with lead(config), full_disk_said(config.artifacts_dir):
            result = _run_chain(config)
    except Preempted as stop:
        if deployment.id is not None:  # somebody is there to run it again
            raise _schedule_again(str(stop)) from None
        return Failed(name=PREEMPTED, message=str(stop))
    except (RunError, ConfigError) as error:
        return Failed(message=str(error))
    if config.publish.candidate == NO_CANDIDATE:
        choice = result.gates.metrics["choice"]
        return Completed(message=f"Nothing is published, as {choice}. Report: {report_path(config)}")
    if result.published is None:
        return Failed(message=f"No candidate passed the gates, so nothing was published. See {report_path(config)}.")
    released = result.published.metrics
    return Completed(
        message=f"{released['model_name']} version {released['version']} is published in {config.publish.model_repo}. "
        f"Report: {report_path(config)}. Serve it: python -m flows.serve"
    )


def _asks_for_checkpoint(error: BaseException) -> bool:
    """SIGTERM does, unless the Prefect runner sent it: it cancels a run like that, and says so beforehand."""
    return isinstance(error, TerminationSignal) and get_intent() != "cancel"


def _schedule_again(message: str) -> Pause:
    """Hands this run of a deployment back to whoever runs what is due; what ends it here without an outcome."""
    state: State[None] = AwaitingRetry(message=message)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(flow_run.id), state, force=True)
    return Pause(message, state=state)


def _run_chain(config: Config) -> ChainResult:
    store = ArtifactStore(config.artifacts_dir / "store")
    record = RunRecord.load(config)

    def run(stage: Stage) -> Artifact:
        started = time.monotonic()
        found, reason = store.find(stage)
        why = reason if found else record.why_it_runs(stage, reason)
        logger.info("%s: %s: %s", stage.name, "skipped" if found else "runs", why)
        as_named = run_stage.with_options(name=stage.name, task_run_name=stage.name)
        state = as_named(stage, store, found, return_state=True)
        if not state.is_completed():
            kind = Preempted if state.name == PREEMPTED else RunError
            raise kind(state.message or f"{stage.name}: {state.name}")
        artifact = cast(Artifact, state.result())
        record.add(stage, found is None, why, artifact.key, time.monotonic() - started)
        return artifact

    result = run_chain(config, run)
    report_path(config).write_bytes((result.report.path / "report.html").read_bytes())
    (run_dir(config) / "config.json").write_text(to_json(config))
    show_in_prefect(result, record)
    return result
