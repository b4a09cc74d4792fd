"""Scheduled runs: registers every file of conf/deployment/ with a Prefect server.

    prefect server start                         # in a terminal of its own, if there is no server yet
    export PREFECT_API_URL=http://127.0.0.1:4200/api
    python -m flows.deploy --serve               # register, then stay and run what is due in this process
    python -m flows.deploy --work-pool my_pool   # register for workers: prefect worker start --pool my_pool
    python -m flows.deploy --prune               # register, and delete deployments whose file is gone

All files are checked before the first one is registered. Registering again changes nothing but what a file says now; it
also resumes a schedule that was paused. A deployment keeps its overrides and composes them when a run starts. Its
runs never overlap: one that falls due while another works waits for it. It is not dropped, since somebody may have
asked for it by hand, and it is cheap: stages that the first one finished are skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.runner import Runner
from prefect.runner.storage import LocalStorage
from prefect.schedules import Cron
from prefect.server.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings
from pydantic import ValidationError

from flows.artifact import PROJECT_ROOT
from flows.config import ConfigError, RunError
from flows.deployment_file import DEPLOYMENT_DIR, FLOWS, DeploymentFile, read_deployment_files

TAG = "millrace"
"""Marks the deployments that belong to us; no others are ever deleted."""
SERVER_TIMEOUT_S = 2.0
WORK_POOL_TYPE = "process"


def deploy(directory: Path, work_pool: str | None = None, prune: bool = False, serve_here: bool = False) -> None:
    """Registers the deployment files of a directory and prints what is registered now.

    Args:
        directory: Holds the files; see `DeploymentFile`.
        work_pool: Name of the work pool whose workers run them; None leaves each deployment in the pool that it has.
        prune: Delete deployments with our tag whose file is gone; they are only listed otherwise.
        serve_here: Take the deployments out of any work pool, stay, and run them here until interrupted.

    Raises:
        ConfigError: A file is wrong, or the work pool does not fit; nothing has been registered.
        RunError: No server answers.
    """
    files = read_deployment_files(directory)
    next_runs = {path: next_run(path, file) for path, file in files.items()}
    api_url = check_server()
    with get_client(sync_client=True) as client:
        if work_pool is not None:
            _check_work_pool(client, work_pool, api_url)
        runner = DeploymentRunner(pause_on_shutdown=True) if serve_here else None
        ids = [_register(runner_deployment(file, work_pool, serve_here), runner) for file in files.values()]
        _print_table(files, next_runs, [client.read_deployment(deployment_id) for deployment_id in ids])
        _report_orphans(client, ids, prune)
    if runner and ids:
        print("Running what is due until Ctrl-C, which cancels runs at work and pauses the schedules.", flush=True)
        asyncio.run(runner.start())


def next_run(path: Path, file: DeploymentFile) -> datetime:
    """When the schedule falls due next, in its own timezone, reckoned as the Prefect server does.

    Raises:
        ConfigError: The cron expression or the timezone is not one, or the schedule never falls due.
    """
    try:
        schedule = CronSchedule(cron=file.cron, timezone=file.timezone)
    except ValidationError as error:
        if error.errors()[0]["loc"]:
            raise ConfigError(
                f"{path}: cron={file.cron!r} must give minute, hour, day of month, month and day of week. "
                'Set cron: "0 2 * * *" for every night at two.'
            ) from None
        raise ConfigError(
            f"{path}: timezone={file.timezone!r} must be an IANA name. Set timezone: Europe/Berlin, or UTC."
        ) from None
    try:
        (date,) = asyncio.run(schedule.get_dates(1))
    except ValueError:  # CroniterBadDateError
        raise ConfigError(
            f"{path}: cron={file.cron!r} never falls due: no such day exists. Set another day or month."
        ) from None
    return date


def check_server() -> str:
    """URL of the Prefect server of this environment or profile, which answers.

    Raises:
        RunError: None is set, or it does not answer; says how to start one.
    """
    api_url = get_current_settings().api.url
    start = "Start one with `prefect server start` and `export PREFECT_API_URL=http://127.0.0.1:4200/api`."
    if not api_url:
        raise RunError(f"PREFECT_API_URL is not set: schedules need a Prefect server that stays. {start}")
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": SERVER_TIMEOUT_S}, sync_client=True) as client,
        ):
            client.api_version()
    except Exception as error:  # whatever can go wrong in a network, all of it for the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"PREFECT_API_URL={api_url}: no Prefect server answers there ({reason}). {start}") from error
    return api_url


def _check_work_pool(client: SyncPrefectClient, name: str, api_url: str) -> None:
    pools = {pool.name: pool.type for pool in client.read_work_pools()}
    if name not in pools:
        raise ConfigError(
            f"--work-pool={name} does not exist on {api_url}, which has {', '.join(sorted(pools)) or 'none'}. "
            f"Create it with `prefect work-pool create {name} --type {WORK_POOL_TYPE}`."
        )
    if pools[name] != WORK_POOL_TYPE:
        raise ConfigError(
            f"--work-pool={name} is of type {pools[name]}, and runs start in {PROJECT_ROOT}, which only workers of "
            f"type {WORK_POOL_TYPE} can enter. Create one: `prefect work-pool create my_pool --type {WORK_POOL_TYPE}`."
        )


def runner_deployment(file: DeploymentFile, work_pool: str | None, serve_here: bool) -> RunnerDeployment:
    """The file in Prefect's terms: one run at a time, started in the project's directory.

    Args:
        file: A valid one.
        work_pool: See `deploy`.
        serve_here: See `deploy`.
    """
    made = RunnerDeployment.from_storage(
        storage=LocalStorage(str(PROJECT_ROOT)),
        entrypoint=FLOWS[file.flow],  # a module: a file's path would put flows/ itself on sys.path
        name=file.name,
        schedule=Cron(file.cron, timezone=file.timezone),
        paused=False,
        parameters={"overrides": file.overrides},
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        description=file.description or None,
        tags=sorted({TAG, *file.tags}),
        work_pool_name=work_pool,
    )
    deployment = cast(RunnerDeployment, made)  # a coroutine only if called from one
    if serve_here:
        deployment.work_pool_name = None  # said, not left out: an update clears it
    return deployment


def _register(deployment: RunnerDeployment, runner: DeploymentRunner | None) -> UUID:
    try:
        return cast(UUID, runner.add_deployment(deployment) if runner else deployment.apply())
    except DeploymentApplyError as error:
        raise RunError(f"{deployment.full_name} could not be registered: {error}") from error


class DeploymentRunner(Runner):
    """Prefect's runner, with an end that leaves no run behind.

    On SIGTERM and Ctrl-C it cancels its runs, which takes their ranks down, and waits for that. Prefect 3.8.8 kills the
    processes without telling the server, where the runs stay Running and hold their deployments' only slot.
    """

    async def start(self, run_once: bool = False, webserver: bool | None = None) -> None:
        """Runs what is due until a signal comes."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.handle_sigterm)
        await super().start(run_once, webserver)

    def handle_sigterm(self, *args: object) -> None:
        """Starts the orderly end; called by the SIGTERM handler that `start` installs."""
        if self.stopping:
            return
        if not self.started:
            sys.exit(0)
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(lambda: loop.create_task(self.astop()))  # wakes the loop, which sits in select


def _print_table(
    files: Mapping[Path, DeploymentFile], next_runs: Mapping[Path, datetime], registered: Iterable[DeploymentResponse]
) -> None:
    if not files:
        print("There is no deployment file.")
        return
    rows = [("deployment", "cron", "next run", "run by", "overrides")]
    for (path, file), deployment in zip(files.items(), registered, strict=True):
        pool = deployment.work_pool_name
        rows.append(
            (
                file.full_name,
                file.cron,
                f"{next_runs[path]:%Y-%m-%d %H:%M %Z}",
                f"prefect worker start --pool {pool}" if pool else "python -m flows.deploy --serve",
                " ".join(file.overrides),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for file in files.values():
        print(f"Run it now: prefect deployment run '{file.full_name}'")


def _report_orphans(client: SyncPrefectClient, kept: Sequence[UUID], prune: bool) -> None:
    ours = client.read_deployments(deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])))
    for deployment in ours:
        if deployment.id in kept:
            continue
        full_name = f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"
        if prune:
            client.delete_deployment(deployment.id)
        print(f"{full_name} has no file any more: {'deleted' if prune else 'still registered; --prune deletes it'}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m flows.deploy",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--directory", type=Path, default=DEPLOYMENT_DIR, help="where the files are (conf/deployment)")
    parser.add_argument("--prune", action="store_true", help="delete deployments of ours whose file is gone")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--serve", action="store_true", help="stay, and run what is due in this process")
    who.add_argument("--work-pool", metavar="NAME", help="let workers of this existing pool run them")
    options = parser.parse_args(arguments)
    try:
        deploy(options.directory, options.work_pool, options.prune, options.serve)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
