from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows.config import ConfigError
from flows.serving import installation, server
from flows.serving.installation import ServerError
from flows.serving.server import PREFIX, SHARED_MEMORY_DIR, InferenceServer
from tests.serving.tiny_chain import NAME, Chain

MODELS = [NAME, f"{NAME}_text"]


def test_missing_server_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "pytriton", None)  # what the import system says of a package that is not there
    with pytest.raises(ServerError, match=r'pip install "millrace\[embedded\]"'):
        installation.check_server_available()


def test_numpy_2_is_refused_with_the_remedy() -> None:
    with pytest.raises(ServerError, match=r'numpy 2\.1\.0 is installed.*pip install "numpy<2"'):
        installation._check_numpy("2.1.0")


def test_missing_libpython_is_found_before_the_server_hangs(tmp_path: Path) -> None:
    library = f"libpython{installation.PYTHON_VERSION}.so.1.0".encode()
    stub = installation._find_embedded().stub.read_bytes()
    assert library in stub
    changed = tmp_path / "stub"
    changed.write_bytes(stub.replace(library, library[:-3] + b"9.9"))
    changed.chmod(0o755)
    with pytest.raises(
        ServerError, match=rf"cannot load .*libpython.*apt-get install libpython{installation.PYTHON_VERSION}"
    ):
        installation._check_shared_libraries(changed, installation._environment())


def test_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"serve.grpc_port={port} cannot be bound on 127.0.0.1.*serve.grpc_port=0"),
            InferenceServer(tmp_path, [], tmp_path / "server.log", grpc_port=port),
        ):
            pass


@pytest.mark.server
@pytest.mark.parametrize(
    "name", ["metrics_port", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("http_port", "grpc_port"))]
)
def test_a_port_that_is_taken_meanwhile_is_chosen_anew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = server._choose_ports
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))

        def lose_one(host: str, wanted: dict[str, int]) -> dict[str, int]:
            ports = choose(host, wanted)
            if not chosen:
                listener.listen()
                ports[name] = listener.getsockname()[1]
            chosen.append(ports)
            return ports

        chosen: list[dict[str, int]] = []
        monkeypatch.setattr(server, "_choose_ports", lose_one)
        (tmp_path / "repository").mkdir()
        with InferenceServer(tmp_path / "repository", [], tmp_path / "server.log", exit_timeout_s=0) as started:
            addresses = {"http_port": started.http_address, "metrics_port": started.metrics_address}
            port = addresses.get(name, started.grpc_address).rpartition(":")[2]
            started.check_running()
        assert len(chosen) == 2
        assert int(port) == chosen[1][name] != listener.getsockname()[1]


def own_leftovers(pid: int) -> list[str]:
    return [path.name for path in SHARED_MEMORY_DIR.iterdir() if path.name.startswith(f"{PREFIX}-{pid}-")]


@pytest.mark.server
def test_crash_at_start_shows_why_and_leaves_nothing(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.entry.path / "repo", tmp_path / "repo")
    (tmp_path / "repo" / NAME / "1" / "model.onnx").unlink()
    before = own_leftovers(os.getpid())
    with (
        pytest.raises(ServerError, match=r"model\.onnx is missing\. Publish the model again"),
        InferenceServer(tmp_path / "repo", MODELS, tmp_path / "server.log"),
    ):
        pass
    assert own_leftovers(os.getpid()) == before


@pytest.mark.server
def test_a_server_on_path_comes_first(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(chain.entry.path / "repo", tmp_path / "repo")
    (tmp_path / "runtime").mkdir()
    embedded = installation.prepare_installation(tmp_path / "runtime")
    on_path = tmp_path / "bin" / "tritonserver"
    on_path.parent.mkdir()
    library_path = embedded.environment["LD_LIBRARY_PATH"]
    command = shlex.join([str(embedded.binary), *embedded.arguments])
    on_path.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={shlex.quote(library_path)} exec {command} "$@"\n')
    on_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{on_path.parent}{os.pathsep}{embedded.environment['PATH']}")
    monkeypatch.setitem(sys.modules, "pytriton", None)  # nothing else to fall back on
    with InferenceServer(tmp_path / "repo", MODELS, tmp_path / "server.log") as server:
        assert server.ready_versions(NAME) == [1]


@pytest.mark.server
def test_killed_server_is_reported_and_leaves_nothing(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.entry.path / "repo", tmp_path / "repo")
    before = own_leftovers(os.getpid())
    with InferenceServer(tmp_path / "repo", MODELS, tmp_path / "server.log") as server:
        assert server._process is not None
        assert len(own_leftovers(os.getpid())) > len(before)
        server._process.kill()
        server._process.wait()
        with pytest.raises(ServerError, match=r"ended with exit code -9"):
            server.check_running()
    assert own_leftovers(os.getpid()) == before


@pytest.mark.server
def test_killed_owner_takes_the_server_with_it_and_the_next_one_sweeps_up(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.entry.path / "repo", tmp_path / "repo")
    script = """
import sys, time
from pathlib import Path
from flows.serving.server import InferenceServer
repository = Path(sys.argv[1])
with InferenceServer(repository, sys.argv[2:], repository.with_name("server.log"), exit_timeout_s=1) as server:
    print(server._process.pid, flush=True)
    time.sleep(600)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "repo"), NAME], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    server_pid = int(owner.stdout.readline())
    # a process ends its pidfd; the server is no child of this one and cannot be waited for otherwise
    watched = os.pidfd_open(server_pid)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    ended, _, _ = select.select([watched], [], [], 30)
    os.close(watched)
    assert ended, "the server outlived its owner"
    left_over = SHARED_MEMORY_DIR / f"{PREFIX}-{owner.pid}-left"
    left_over.write_bytes(b"as after SIGKILL of the server, too")
    with InferenceServer(tmp_path / "repo", [NAME], tmp_path / "second.log"):
        assert own_leftovers(owner.pid) == []


def test_what_is_said_at_every_start_is_no_cause(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    noise = 'E1124 00:23:23.392571 28209 server.cc:241] "CudaDriverHelper has not been initialized."\n'
    log.write_text(f"{noise}Error: Failed to initialize NVML\nerror: creating server: Internal - no model\n")
    assert server._last_lines(log) == "  | error: creating server: Internal - no model"
