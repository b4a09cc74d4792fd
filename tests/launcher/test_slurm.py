"""Ranks as jobs of a real Slurm that the test sets up for itself: what comes back when they fail, and what stays."""

from __future__ import annotations

import getpass
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.config import ConfigError
from flows.config.launcher import LauncherConfig, LauncherKind, SlurmConfig
from flows.launcher import Preempted, RankError, free_port, launch_ranks
from flows.launcher.check import check_launcher

RankModule = Callable[[str], str]
Leftovers = Callable[[], list[str]]
Until = Callable[[Callable[[], Any]], Any]
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin:/sbin"
MISSING = [
    program
    for program in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
    if shutil.which(program, path=SYSTEM_PATH) is None
]
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(bool(MISSING), reason=f"needs a Slurm (Debian: slurm-wlm, munge), and lacks {MISSING}"),
]
START_TIMEOUT_S = 60.0
DEADLINE_S = 180.0
KILL_WAIT_S = 5
"""Between SIGTERM and SIGKILL, in this cluster."""
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/%n.pid
SlurmdSpoolDir={root}/%n
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MessageTimeout=5
KillWait={kill_wait_s}
MailProg=/bin/true
NodeName=virtual1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=virtual2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=spot Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


class Cluster:
    """A controller and two nodes on loopback, of the user who runs the tests; nothing of the system is touched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        (root / "state").mkdir()
        key = root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        (root / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                root=root,
                ports=[free_port() for _ in range(3)],
                kill_wait_s=KILL_WAIT_S,
            )
        )
        files = {"key-file": key, "socket": root / "munge.socket", "pid-file": root / "munge.pid"}
        files |= {"log-file": root / "munge.log", "seed-file": root / "munge.seed"}
        self._start("munged", "--force", "--foreground", *(f"--{name}={path}" for name, path in files.items()))

    def _start(self, program: str, *options: str) -> None:
        name = " ".join((program, *options[:1]))
        with (self.root / f"{program}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *options],
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": SYSTEM_PATH},
                start_new_session=True,
            )

    def start_controller(self) -> None:
        self._start("slurmctld", "-D")

    def stop_controller(self) -> None:
        """In order: killed within seconds of a submission it would not know the job when it is back."""
        process = self._daemons.pop("slurmctld -D")
        process.terminate()
        process.wait(START_TIMEOUT_S)

    def start(self) -> None:
        self.start_controller()
        for node in ("virtual1", "virtual2"):
            self._start("slurmd", f"-N{node}", "-D")
        deadline = time.monotonic() + START_TIMEOUT_S
        while self("sinfo", "--noheader", "--format=%D %t", "--partition=main") != "2 idle":
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def stop(self) -> None:
        self("scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.jobs() and time.monotonic() < deadline:  # without its daemons a job would run on
            time.sleep(0.1)
        for process in reversed(self._daemons.values()):
            process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.root.glob("*.log"))

    def __call__(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    def jobs(self) -> list[str]:
        """Number and state of each job that waits, runs or is being put away."""
        return self("squeue", "--noheader", "--format=%i %T").splitlines()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(root / "slurm.conf"))
        patch.setattr("flows.launcher.slurm.POLL_INTERVAL_S", 0.5)
        one = Cluster(root)
        try:
            one.start()
            yield one
        finally:
            one.stop()


SAVES = (
    "(log_dir / f'alive-{rank}').touch()\n"
    "while not asked_to_save():\n    time.sleep(0.01)\n"
    "(log_dir / f'saved-{rank}').touch()\n"
    "sys.exit(EXIT_PREEMPTED)"
)
SAVES_ONCE = f"if (log_dir / f'saved-{{rank}}').exists():\n    sys.exit()\n{SAVES}"
HANGS_ONCE = (
    "if (log_dir / f'alive-{rank}').exists():\n    sys.exit()\n(log_dir / f'alive-{rank}').touch()\ntime.sleep(3600)"
)
HANGS = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(log_dir / f'alive-{rank}').touch()\ntime.sleep(3600)"


class Launch:
    """One launch of two ranks, on two nodes unless told otherwise."""

    def __init__(self, log_dir: Path, cluster: Cluster) -> None:
        self.log_dir = log_dir
        self.cluster = cluster

    def config(self, nodes: int = 2, slurm: SlurmConfig | None = None, **settings: Any) -> LauncherConfig:
        return LauncherConfig(
            kind=LauncherKind.slurm,
            num_nodes=nodes,
            num_ranks=2 // nodes,
            gpus_per_rank=0,
            slurm=slurm or SlurmConfig(),
            **settings,
        )

    def __call__(self, module: str, on_poll: Callable[[], None] = lambda: None, **settings: Any) -> int:
        deadline = time.monotonic() + DEADLINE_S

        def look() -> None:
            assert time.monotonic() < deadline, self.cluster.logs()
            on_poll()

        return launch_ranks(module, self.log_dir, self.config(**settings), self.log_dir, look)

    @property
    def job(self) -> str:
        return (self.log_dir / "job.id").read_text()

    def all(self, what: str) -> bool:
        return len(list(self.log_dir.glob(f"{what}-*"))) == 2

    def once(self, condition: Callable[[], bool], action: Callable[[], None]) -> Callable[[], None]:
        """For `on_poll`: does something the first time that a condition holds."""
        done: list[bool] = []

        def look() -> None:
            if not done and condition():
                done.append(True)
                action()

        return look


@pytest.fixture
def launch(cluster: Cluster, tmp_path: Path) -> Launch:
    return Launch(tmp_path / "logs of 100%job", cluster)


def test_ranks_of_two_nodes_get_their_numbers_and_nothing_stays(
    launch: Launch, cluster: Cluster, rank_module: RankModule, leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "7")  # as inside of an allocation
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "9")
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"]
    names += ["OMP_NUM_THREADS", "SLURMD_NODENAME"]
    assert launch(rank_module(f"print([os.environ[name] for name in {names}])")) == 0
    for rank in range(2):
        log = launch.log_dir.joinpath(f"rank-{rank}.log").read_text()
        assert f"['{rank}', '0', '2', '1', '127.0.0.1', 'lo', '1', 'virtual{rank + 1}']" in log
        assert f"$ RANK={rank} LOCAL_RANK=0 WORLD_SIZE=2" in log  # what to type to run it by hand
    assert not leftovers()
    assert not cluster.jobs()
    assert "JobState=COMPLETED" in cluster("scontrol", "show", "job", launch.job)


def test_a_killed_rank_ends_the_others_and_its_own_words_are_shown(
    launch: Launch, cluster: Cluster, rank_module: RankModule, leftovers: Leftovers
) -> None:
    kills = "print('rank', rank, 'says')\nif rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    with pytest.raises(RankError, match=r"(?s)rank 1 was killed by SIGKILL; its last lines.*rank 1 says"):
        launch(rank_module(kills + SAVES), nodes=1)
    assert not cluster.jobs()  # above all, it is not queued again because the other rank has saved
    assert not leftovers()
    once = "if (log_dir / f'killed-{rank}').exists():\n    sys.exit()\n(log_dir / f'killed-{rank}').touch()\n"
    assert launch(rank_module(once + kills), nodes=1, max_restarts=1) == 1


def test_a_rank_that_spoke_is_quoted_and_not_started_again(launch: Launch, rank_module: RankModule) -> None:
    module = rank_module("speak_error(log_dir, 'the loss is not finite') if rank else None\nsys.exit(2 * rank)")
    with pytest.raises(RankError, match="rank 1 ended with exit code 2: the loss is not finite"):
        launch(module, max_restarts=3)
    assert "restart" not in launch.cluster("scontrol", "show", "job", launch.job)


def test_somebody_else_cancels_the_job(
    launch: Launch, cluster: Cluster, rank_module: RankModule, leftovers: Leftovers
) -> None:
    cancel = launch.once(lambda: launch.all("alive"), lambda: print(cluster("scancel", launch.job)))
    with pytest.raises(RankError, match=r"Slurm job \d+ was cancelled by somebody else \(state CANCELLED") as caught:
        launch(rank_module(SAVES), cancel, max_restarts=3)
    assert caught.value.comes_again
    assert launch.all("saved")
    assert not cluster.jobs()
    assert not leftovers()


def test_ranks_that_saved_when_told_go_back_to_the_queue_and_the_flow_waits(
    launch: Launch, cluster: Cluster, rank_module: RankModule, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tell = launch.once(lambda: launch.all("alive"), lambda: print(cluster("scancel", "--signal=TERM", launch.job)))
    assert launch(rank_module(SAVES_ONCE), tell) == 0
    facts = cluster("scontrol", "show", "job", launch.job)
    assert "Restarts=1" in facts
    assert "JobState=COMPLETED" in facts
    assert f"Slurm job {launch.job}: PENDING (BeginTime)" in caplog.text


@pytest.mark.parametrize(("partition", "body", "jobs"), [("main", SAVES_ONCE, 1), ("spot", HANGS_ONCE, 2)])
def test_a_preempted_job_comes_back(
    partition: str, body: str, jobs: int, launch: Launch, cluster: Cluster, rank_module: RankModule, tmp_path: Path
) -> None:
    def preempt() -> None:
        urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--time=10"]
        cluster("sbatch", *urgent, f"--wrap=touch {tmp_path}/urgent")

    numbers: set[str] = set()
    steps = [launch.once(lambda: launch.all("alive"), preempt), lambda: numbers.add(launch.job)]
    assert (
        launch(rank_module(body), lambda: [step() for step in steps] and None, slurm=SlurmConfig(partition=partition))
        == 0
    )
    assert (tmp_path / "urgent").exists()
    assert len(numbers) == jobs  # where Slurm does not queue it again, this does


def test_the_flow_is_told_to_save(
    launch: Launch, cluster: Cluster, rank_module: RankModule, leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sigterm(BaseException):
        pass

    def interrupt() -> None:
        if launch.all("alive"):
            raise Sigterm

    monkeypatch.setattr("flows.launcher.outcome._is_preemption", lambda error: isinstance(error, Sigterm))
    with pytest.raises(Preempted, match="stopped by SIGTERM after the ranks had saved a checkpoint"):
        launch(rank_module(SAVES), interrupt)
    assert launch.all("saved")
    assert not cluster.jobs()
    assert not leftovers()


def test_ctrl_c_leaves_no_job_waiting_or_running(
    launch: Launch,
    cluster: Cluster,
    rank_module: RankModule,
    leftovers: Leftovers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def interrupt() -> None:
        if launch.all("alive") or "PENDING (PartitionNodeLimit)" in caplog.text:
            raise KeyboardInterrupt

    caplog.set_level(logging.INFO)
    for nodes in (3, 2):  # this cluster has two
        caplog.clear()
        with pytest.raises(KeyboardInterrupt):
            launch(rank_module(HANGS), interrupt, slurm=SlurmConfig(directives=[f"--nodes={nodes}"]))
        assert not cluster.jobs()
        assert not leftovers()


def test_a_job_outlives_its_killed_flow_and_is_taken_over(
    launch: Launch, cluster: Cluster, rank_module: RankModule, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    module = rank_module("while not (log_dir / 'go').exists():\n    time.sleep(0.01)\n")
    program = (
        "from pathlib import Path\nfrom flows.launcher import launch_ranks\n"
        "from flows.config.launcher import LauncherConfig\n"
        f"launch_ranks({module!r}, Path({str(launch.log_dir)!r}), "
        f"LauncherConfig(kind='slurm', num_ranks=2, gpus_per_rank=0), Path({str(launch.log_dir)!r}))"
    )
    flow = subprocess.Popen([sys.executable, "-c", program])
    until((launch.log_dir / "job.id").exists)
    flow.kill()
    flow.wait()
    job = launch.job
    assert launch(module, lambda: (launch.log_dir / "go").touch(), nodes=1) == 0
    assert launch.job == job
    assert f"Slurm job {job} of an earlier command goes on" in caplog.text


def test_a_controller_that_is_away_for_a_while_changes_nothing(
    launch: Launch, cluster: Cluster, rank_module: RankModule, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    module = rank_module(
        "(log_dir / f'alive-{rank}').touch()\nwhile not (log_dir / 'go').exists():\n    time.sleep(0.01)\n"
    )
    steps = [
        launch.once(lambda: launch.all("alive"), cluster.stop_controller),
        launch.once(lambda: "goes on meanwhile" in caplog.text, cluster.start_controller),
        launch.once(lambda: "Slurm answers again" in caplog.text, lambda: (launch.log_dir / "go").touch()),
    ]
    assert launch(module, lambda: [step() for step in steps] and None) == 0
    assert "`scontrol show job" in caplog.text


def test_what_slurm_refuses_is_said_before_anything_runs(launch: Launch, rank_module: RankModule) -> None:
    asked = launch.config(slurm=SlurmConfig(partition="nope"))
    with pytest.raises(ConfigError, match=r"launcher.slurm.partition=nope.*: Slurm refused .*[Ii]nvalid partition"):
        check_launcher(asked)
    check_launcher(launch.config())
    with pytest.raises(RankError, match=r"launcher.slurm.partition=nope.*: Slurm refused .*[Ii]nvalid partition"):
        launch_ranks(rank_module(""), launch.log_dir, asked, launch.log_dir)
