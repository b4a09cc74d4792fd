"""Deployment files are checked before they are registered; what is registered runs, takes turns, can be cancelled."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import TypeVar
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Cancelling

from flows.artifact import PROJECT_ROOT
from flows.config import ConfigError, RunError
from flows.deploy import SERVER_TIMEOUT_S, TAG, check_server, main, next_run
from flows.deployment_file import DEPLOYMENT_DIR, read_deployment_files

PATIENCE_S = 90.0
"""Far beyond what any step needs; reached only if it never happens."""
Found = TypeVar("Found")

NIGHTLY = {"name": "nightly", "flow": "train", "cron": "0 2 * * *", "overrides": ["+experiment=quickstart"]}


def write(directory: Path, file_name: str = "nightly.yaml", **changes: object) -> Path:
    """A deployment file like NIGHTLY but for some keys; None leaves a key out."""
    path = directory / file_name
    path.write_text(yaml.safe_dump({key: value for key, value in (NIGHTLY | changes).items() if value is not None}))
    return path


def eventually(look: Callable[[], Found]) -> Found:
    """The first true value that looking again and again gives."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
    return found


def test_the_shipped_files_are_valid() -> None:
    files = read_deployment_files(DEPLOYMENT_DIR)
    due = {file.name: next_run(path, file) for path, file in files.items()}
    assert (due["nightly_quickstart"].hour, due["nightly_quickstart"].minute) == (2, 0)
    assert due["nightly_quickstart"] > datetime.now(UTC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corn": "0 2 * * *"}, r"corn is not a setting of a deployment. Did you mean cron\?"),
        ({"cron": None}, "cron is missing. Required: name, flow, cron."),
        ({"cron": "61 2 * * *"}, r"cron='61 2 \* \* \*' must give minute, hour.* Set cron: \"0 2"),
        ({"cron": "0 2 31 2 *"}, r"cron='0 2 31 2 \*' never falls due: no such day exists"),
        ({"timezone": "Mars/Olympus"}, "timezone='Mars/Olympus' must be an IANA name. Set timezone: Europe/Berlin"),
        ({"flow": "trian"}, "flow=trian cannot be scheduled. Choose one of: train."),
        ({"name": "every/night"}, "name=every/night must be letters"),
        ({"overrides": "+experiment=quickstart"}, "overrides='.experiment=quickstart': .*list"),
        ({"overrides": ["+experiment=quickstrat"]}, "overrides: experiment=quickstrat does not exist. .*quickstart"),
        (
            {"overrides": ["train.max_step=3"]},
            "overrides: train.max_step is not a setting. Did you mean train.max_steps",
        ),
    ],
)
def test_a_mistake_is_answered_with_file_key_and_remedy(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        [next_run(path, file) for path, file in read_deployment_files(tmp_path).items()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not YAML: .*line 1"),
        ("cron: * * * * *", "is not YAML: .*alias"),
        ("name: a\nname: b", 'is not YAML: .*duplicate key "name"'),
        ("", "must hold settings such as name: nightly, not None"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.yml").write_text(text)
    with pytest.raises(ConfigError, match=f"broken.yml:? {message}"):
        read_deployment_files(tmp_path)


def test_a_name_can_be_taken_once(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml")
    write(tmp_path, "b.yml")
    with pytest.raises(ConfigError, match=r"b.yml: name=nightly is taken by .*a.yaml"):
        read_deployment_files(tmp_path)


def test_without_a_server_it_says_how_to_start_one() -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(RunError, match="prefect server start"):
        check_server()


@pytest.mark.parametrize("kind", ["closed", "silent", "another"])
def test_a_server_that_does_not_answer_is_reported_in_time(kind: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind != "closed":
            listener.listen()
        another = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501 to everything
        Thread(target=another.serve_forever, daemon=True).start()
        port = another.server_port if kind == "another" else listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}/api"
        started = time.monotonic()
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(RunError) as refusal:
            check_server()
        another.shutdown()
        another.server_close()
    assert time.monotonic() - started < SERVER_TIMEOUT_S + 2
    assert f"PREFECT_API_URL={url}: no Prefect server answers there" in str(refusal.value)
    assert "prefect server start" in str(refusal.value)


@pytest.fixture
def client(api_url: str, tmp_path: Path) -> Iterator[SyncPrefectClient]:
    """A client of a server without deployments."""
    with (
        temporary_settings({PREFECT_API_URL: api_url, PREFECT_HOME: tmp_path / "home"}),
        get_client(sync_client=True) as client,
    ):
        yield client
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An empty directory for deployment files."""
    directory = tmp_path / "deployments"
    directory.mkdir()
    return directory


def register(files: Path, *arguments: str) -> int:
    return main(["--directory", str(files), *arguments])


def registered(client: SyncPrefectClient) -> dict[str, DeploymentResponse]:
    return {deployment.name: deployment for deployment in client.read_deployments()}


@pytest.fixture
def pool(client: SyncPrefectClient) -> Iterator[WorkPool]:
    """A work pool for processes."""
    yield client.create_work_pool(WorkPoolCreate(name="machines", type="process"))
    client.delete_work_pool("machines")


def test_registering_again_changes_only_what_the_file_says(
    client: SyncPrefectClient, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["+experiment=quickstart", "train.optimizer.eps=1e-7", "name='two, words'"]
    write(files, overrides=overrides, tags=["mine"])
    assert register(files) == 0
    before = registered(client)["nightly"]
    assert before.parameters == {"overrides": overrides}
    assert set(before.tags) == {TAG, "mine"}
    assert before.global_concurrency_limit is not None
    assert before.global_concurrency_limit.limit == 1
    assert before.concurrency_options is not None
    assert before.concurrency_options.collision_strategy == ConcurrencyLimitStrategy.ENQUEUE

    write(files, cron="30 4 * * *", timezone="Europe/Berlin", tags=["mine"])
    client.pause_deployment(before.id)  # as a runner does when it ends
    assert registered(client)["nightly"].paused
    assert register(files) == 0
    (after,) = client.read_deployments()
    assert after.id == before.id
    assert not after.paused
    (schedule,) = after.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("30 4 * * *", "Europe/Berlin")  # type: ignore[union-attr]

    printed = capsys.readouterr().out
    ((path, file),) = read_deployment_files(files).items()
    due = next_run(path, file)
    assert f"train/nightly  30 4 * * *  {due:%Y-%m-%d %H:%M %Z}" in printed
    assert "prefect deployment run 'train/nightly'" in printed

    runs_of_it = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[after.id]))
    scheduled = eventually(lambda: client.read_flow_runs(flow_run_filter=runs_of_it))
    assert due in {run.expected_start_time for run in scheduled}
    assert all(run.state and run.state.is_scheduled() for run in scheduled)


def test_one_wrong_file_and_nothing_is_registered(
    client: SyncPrefectClient, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(files, "a.yaml", name="good")
    write(files, "b.yaml", cron="every night")
    assert register(files) == 2
    assert "b.yaml: cron='every night'" in capsys.readouterr().err
    assert registered(client) == {}


def test_a_removed_file_is_reported_and_pruned_on_request(
    client: SyncPrefectClient, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(files, "a.yaml", name="kept")
    gone = write(files, "b.yaml", name="gone")
    assert register(files) == 0
    foreign = client.create_deployment(flow_id=client.create_flow_from_name("train"), name="foreign", tags=["other"])
    gone.unlink()
    assert register(files) == 0
    assert "train/gone has no file any more: still registered; --prune deletes it" in capsys.readouterr().out
    assert set(registered(client)) == {"kept", "gone", "foreign"}
    assert register(files, "--prune") == 0
    assert "train/gone has no file any more: deleted" in capsys.readouterr().out
    assert set(registered(client)) == {"kept", "foreign"}
    assert registered(client)["foreign"].id == foreign


def test_a_work_pool_must_exist_and_stays(
    client: SyncPrefectClient, files: Path, pool: WorkPool, capsys: pytest.CaptureFixture[str]
) -> None:
    write(files)
    assert register(files, "--work-pool", "machine") == 2
    assert "--work-pool=machine does not exist" in (refused := capsys.readouterr().err)
    assert "which has machines. Create it with `prefect work-pool create machine --type process`" in refused
    assert registered(client) == {}
    for arguments in (["--work-pool", pool.name], []):
        assert register(files, *arguments) == 0
        assert registered(client)["nightly"].work_pool_name == pool.name
        assert f"prefect worker start --pool {pool.name}" in capsys.readouterr().out
    (step,) = registered(client)["nightly"].pull_steps or []
    assert step == {"prefect.deployments.steps.set_working_directory": {"directory": str(PROJECT_ROOT)}}


def test_a_work_pool_of_another_type_is_refused(
    client: SyncPrefectClient, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.create_work_pool(WorkPoolCreate(name="containers", type="docker"))
    write(files)
    assert register(files, "--work-pool", "containers") == 2
    assert "--work-pool=containers is of type docker" in capsys.readouterr().err
    assert registered(client) == {}


def processes_naming(path: Path) -> list[int]:
    """Ids of processes with `path` in their command line, which is how ranks are started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(path).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return found


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.distributed
def test_served_runs_wait_their_turn_and_leave_nothing_behind(
    client: SyncPrefectClient, api_url: str, files: Path, pool: WorkPool, tmp_path: Path
) -> None:
    store = tmp_path / "artifacts" / "store"
    overrides = [
        "name=tiny",
        f"artifacts_dir={tmp_path / 'artifacts'}",
        "data.corpus.max_documents=20",
        "data.tokenizer.vocab_size=300",
        "data.sequence_length=32",
        "evaluate.latency.tokens=32",
        "verify.lengths=[1]",
        "model=decoder_1m",
        "steps=none",
        "train.max_steps=1000000",
        "train.micro_batch_size=1",
        "train.global_batch_size=1",
        "launcher.num_ranks=1",
        "launcher.threads_per_rank=1",
        "tracking=none",
    ]
    write(files, name="tiny", cron="0 2 29 2 *", overrides=overrides)
    assert register(files, "--work-pool", pool.name) == 0  # to be taken out of it again
    environment = os.environ | {
        "PREFECT_API_URL": api_url,
        "PREFECT_HOME": str(tmp_path / "home"),
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    }
    with (tmp_path / "serve.log").open("wb") as log:
        serving = subprocess.Popen(
            [sys.executable, "-m", "flows.deploy", "--directory", str(files), "--serve"],
            cwd=PROJECT_ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def start(parameters: dict[str, object] | None = None) -> UUID:
        return client.create_flow_run_from_deployment(registered(client)["tiny"].id, parameters=parameters).id

    def state_of(run: UUID) -> str:
        assert serving.poll() is None, (tmp_path / "serve.log").read_text()
        state = client.read_flow_run(run).state
        return state.name if state else ""

    def running_ranks() -> list[int]:
        return processes_naming(store)

    try:
        eventually(lambda: registered(client)["tiny"].work_pool_name is None)

        # One with parameters of its own that ends in words for its user.
        broken = start({"overrides": [*overrides, "data=files", "data.corpus.paths=[nowhere.txt]"]})
        eventually(lambda: state_of(broken) == "Failed")
        message = client.read_flow_run(broken).state.message  # type: ignore[union-attr]
        assert "data.corpus.paths=" in str(message)
        assert "nowhere.txt" in str(message)

        # One that is preempted (SIGTERM that nobody announced) saves, is scheduled again, and goes on.
        first = start()
        eventually(lambda: [path for path in store.glob("base-*.partial/logs/metrics.jsonl") if path.stat().st_size])
        (rank,) = running_ranks()
        os.kill(parent_of(rank), signal.SIGTERM)
        eventually(lambda: client.read_flow_run(first).run_count == 2)
        assert list(store.glob("base-*.partial/checkpoints/step-*/manifest.json"))
        assert rank not in running_ranks()

        # Two that would overlap: the second waits until the first has been cancelled, with its ranks.
        eventually(running_ranks)
        assert client.read_flow_run(first).parameters == {"overrides": overrides}
        second = start({"overrides": [*overrides, "seed=1"]})
        eventually(lambda: state_of(second) == "AwaitingConcurrencySlot")
        assert state_of(first) == "Running"
        (rank,) = running_ranks()
        client.set_flow_run_state(first, Cancelling())
        eventually(lambda: state_of(first) == "Cancelled")
        assert rank not in running_ranks()

        # The second works; stopping the process that serves cancels it, and the schedule rests.
        eventually(lambda: state_of(second) == "Running")
        serving.terminate()
        assert serving.wait(PATIENCE_S) == 0, (tmp_path / "serve.log").read_text()
        assert client.read_flow_run(second).state.name == "Cancelled"  # type: ignore[union-attr]
        assert running_ranks() == []
        assert registered(client)["tiny"].paused
        with pytest.raises(ProcessLookupError):  # nothing is left of its process group either
            os.killpg(serving.pid, 0)
    finally:
        if serving.poll() is None:
            os.killpg(serving.pid, signal.SIGKILL)
            serving.wait()
