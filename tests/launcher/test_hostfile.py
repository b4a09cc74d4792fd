"""Ranks over ssh to a real sshd on loopback: they get their numbers, save, and end when the connection is cut."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.config import ConfigError
from flows.config.launcher import LauncherConfig, LauncherKind
from flows.launcher import Preempted, RankError, free_port, launch_ranks
from flows.launcher.hostfile import chosen_hosts, read_hostfile

RankModule = Callable[[str], str]
Until = Callable[[Callable[[], Any]], Any]
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:/usr/bin")
needs_sshd = pytest.mark.skipif(SSHD is None, reason="needs sshd (Debian: openssh-server), which is not installed")


def hostfile(directory: Path, text: str) -> Path:
    path = directory / "hosts.txt"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# our nodes\n\nnode1 slots=8\nme@node2 slots=4 # the old one\n")
    assert read_hostfile(path) == {"node1": 8, "me@node2": 4}


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("node1 8", {}, "line 1 is 'node1 8', and each one must read `host slots=8`"),
        ("node1 slots=8\nnode1 slots=8", {}, "line 2 is 'node1 slots=8'.* each host once"),
        ("node1 slots=8", {"num_nodes": 2}, r"launcher.num_nodes=2 needs as many hosts.* Set launcher.num_nodes=1"),
        ("node1 slots=2", {"num_ranks": 4}, r"launcher.num_ranks=4 needs as many slots.* node1 has 2"),
        (None, {}, "hosts.txt is not a file"),
    ],
)
def test_a_hostfile_that_does_not_fit_is_refused(
    text: str | None, settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "hosts.txt" if text is None else hostfile(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        chosen_hosts(LauncherConfig(kind=LauncherKind.hostfile, hostfile=path, **settings))


@pytest.fixture(scope="module")
def ssh_options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """How to reach an sshd of our own."""
    directory = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    port = free_port()
    (directory / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
        "PasswordAuthentication no\nUsePAM no\nStrictModes no\nPidFile none\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself in
    sshd = subprocess.Popen([str(SSHD), "-D", "-f", str(directory / "config")])
    deadline = time.monotonic() + 30
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert time.monotonic() < deadline
        assert sshd.poll() is None
        time.sleep(0.01)
    options = {"IdentityFile": directory / "user", "UserKnownHostsFile": "/dev/null", "StrictHostKeyChecking": "no"}
    yield [
        "-p",
        str(port),
        "-F",
        "none",
        *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
    ]
    sshd.terminate()
    sshd.wait()


@pytest.fixture
def launch(ssh_options: list[str], tmp_path: Path) -> Callable[..., int]:
    """Two ranks on two hosts that are both this one."""

    def run(module: str, on_poll: Callable[[], None] = lambda: None) -> int:
        config = LauncherConfig(
            kind=LauncherKind.hostfile,
            num_nodes=2,
            threads_per_rank=1,
            hostfile=hostfile(tmp_path, "127.0.0.1 slots=1\nlocalhost slots=1\n"),
            ssh_options=ssh_options,
        )
        return launch_ranks(module, tmp_path / "logs", config, tmp_path / "logs", on_poll)

    return run


@needs_sshd
def test_ranks_run_on_each_host_with_our_environment(
    launch: Callable[..., int], rank_module: RankModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME"]
    assert launch(rank_module(f"print([os.environ[name] for name in {names}])")) == 0
    for rank in range(2):
        log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert f"['{rank}', '0', '2', '1', '127.0.0.1', 'INFO', 'lo']" in log


@needs_sshd
def test_a_killed_rank_ends_the_others_too(
    launch: Callable[..., int], rank_module: RankModule, leftovers: Callable[[], list[str]], until: Until
) -> None:
    module = rank_module("if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(3600)")
    with pytest.raises(RankError, match=r"rank 1 was killed by SIGKILL; its last lines"):
        launch(module)
    until(lambda: not [line for line in leftovers() if "rank_under_test" in line])


@needs_sshd
def test_a_cut_connection_ends_the_ranks_and_is_said(
    launch: Callable[..., int],
    rank_module: RankModule,
    leftovers: Callable[[], list[str]],
    until: Until,
    tmp_path: Path,
) -> None:
    def cut() -> None:
        if len(list(tmp_path.glob("logs/alive-*"))) == 2:
            (first, *_) = [p for p in psutil.Process().children() if p.name() == "ssh" and "localhost" in p.cmdline()]
            first.send_signal(signal.SIGKILL)

    module = rank_module("(log_dir / f'alive-{rank}').touch()\ntime.sleep(3600)")
    with pytest.raises(RankError, match=r"the connection to localhost is gone \(ssh ended with -9\)"):
        launch(module, cut)
    until(lambda: not [line for line in leftovers() if "rank_under_test" in line])


@needs_sshd
def test_the_ranks_of_all_hosts_save_when_asked(
    launch: Callable[..., int], rank_module: RankModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sigterm(BaseException):
        pass

    def interrupt() -> None:
        if len(list(tmp_path.glob("logs/alive-*"))) == 2:
            raise Sigterm

    monkeypatch.setattr("flows.launcher.outcome._is_preemption", lambda error: isinstance(error, Sigterm))
    body = (
        "(log_dir / f'alive-{rank}').touch()\n"
        "while not asked_to_save():\n    time.sleep(0.01)\n"
        "sys.exit(EXIT_PREEMPTED)"
    )
    with pytest.raises(Preempted, match="stopped by SIGTERM after the ranks had saved"):
        launch(rank_module(body), interrupt)


@needs_sshd
def test_a_host_that_cannot_be_reached_is_named(
    rank_module: RankModule, ssh_options: list[str], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        config = LauncherConfig(
            kind=LauncherKind.hostfile,
            hostfile=hostfile(tmp_path, "127.0.0.1 slots=1\n"),
            ssh_options=[*ssh_options[2:], "-p", str(taken.getsockname()[1])],
        )
        with pytest.raises(RankError, match=r"the connection to 127.0.0.1 is gone \(ssh ended with 255\): .*refused"):
            launch_ranks(rank_module(""), tmp_path, config, tmp_path)
