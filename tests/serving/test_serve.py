"""`python -m flows.serve` as its user meets it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flows.artifact import Artifact
from flows.config import ConfigError
from flows.config.serving import ServeConfig
from flows.serve import check_public
from flows.serving.client import Client, Transport
from flows.serving.releases.state import record_published
from flows.serving.repository import lock_repository, model_names
from flows.serving.server import PREFIX, SHARED_MEMORY_DIR
from tests.serving.tiny_chain import NAME, Chain

pytestmark = pytest.mark.server
Publish = Callable[[Path, Chain, Artifact], Artifact]
SCRIPT = """
import sys
from pathlib import Path
from flows.config import Config
from flows.config.serving import PublishConfig, ServeConfig
from flows.serve import serve
ports = ServeConfig(http_port=0, grpc_port=0, metrics_port=0, drift_port=0, poll_interval_s=0.2, exit_timeout_s=2)
serve(Config(artifacts_dir=Path(sys.argv[2]), publish=PublishConfig(model_repo=Path(sys.argv[1])), serve=ports))
"""
DEADLINE_S = 60


@contextmanager
def serving(repository: Path, scratch: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running verb and its ready message."""
    command = [sys.executable, "-c", SCRIPT, str(repository), str(scratch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        message = "".join(lines)
        assert "Ready." in message, message
        yield process, message
    finally:
        process.terminate()
        process.wait(30)


def children_of(parent: int) -> list[int]:
    """Processes that the given one started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def test_switches_under_load_without_a_failed_request(
    publish_to: Publish,
    chain: Chain,
    passport: Artifact,
    other_chain: Chain,
    other_passport: Artifact,
    tmp_path: Path,
) -> None:
    repository = tmp_path / "model_repo"
    publish_to(repository, chain, passport)
    with serving(repository, tmp_path / "artifacts") as (process, message):
        check_curl_lines(message)
        addresses = {
            Transport.http: re.search(r"HTTP http://(\S+)", message)[1],  # type: ignore[index]
            Transport.grpc: re.search(r"gRPC (\S+)", message)[1],  # type: ignore[index]
        }
        done = threading.Event()
        counts, failures = {"scores": 0, "text": 0}, []

        def ask(transport: Transport, what: str) -> None:
            ids = np.array([[1, 2, 3]], np.int64)
            with Client(transport, addresses[transport]) as client:
                while not done.is_set():
                    try:
                        if what == "scores":
                            client.scores(NAME, ids, np.ones_like(ids))
                        else:
                            client.generate(f"{NAME}_text", "def", options={"max_tokens": 4})
                        counts[what] += 1
                    except Exception as error:
                        failures.append(f"{transport} {what}: {error}")

        threads = [threading.Thread(target=ask, args=(t, w)) for t in addresses for w in counts]
        for thread in threads:
            thread.start()
        try:
            publish_to(repository, other_chain, other_passport)
            wait_for_version(addresses[Transport.http], 2)
            publish_to(repository, chain, passport)  # the third one makes the server give up the first
            wait_for_version(addresses[Transport.http], 3)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert failures == []
        assert all(count > 20 for count in counts.values()), counts
        children = children_of(process.pid)
        assert children
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Stopping" in process.stdout.read()  # type: ignore[union-attr]
    assert not [pid for pid in children if Path("/proc", str(pid)).exists()]
    assert not [path for path in SHARED_MEMORY_DIR.iterdir() if path.name.startswith(f"{PREFIX}-{process.pid}-")]


def check_curl_lines(message: str) -> None:
    lines = [line.strip() for line in message.splitlines() if line.strip().startswith("curl")]
    assert len(lines) == 2
    for line in lines:
        answer = json.loads(subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout)
        assert "error" not in answer
        assert "outputs" in answer or answer["text_output"]


def wait_for_version(address: str, version: int) -> None:
    """Until both models serve this version, and with it requests that name none."""
    deadline = time.monotonic() + DEADLINE_S
    ready = f"http://{address}/v2/models/{{}}/versions/{version}/ready"
    for model in (NAME, f"{NAME}_text"):
        while True:
            assert time.monotonic() < deadline, f"version {version} of {model} was never served"
            try:
                with urllib.request.urlopen(ready.format(model), timeout=5):
                    break
            except urllib.error.HTTPError:
                os.sched_yield()


def test_refused_version_is_reported_and_the_one_before_stays(
    publish_to: Publish, chain: Chain, passport: Artifact, other_chain: Chain, other_passport: Artifact, tmp_path: Path
) -> None:
    repository = tmp_path / "model_repo"
    publish_to(repository, chain, passport)
    with serving(repository, tmp_path / "artifacts") as (process, message):
        with lock_repository(repository):  # as if it had been damaged after it was promoted
            for name in model_names(NAME):
                shutil.copytree(repository / name / "1", repository / name / "2")
            with (repository / NAME / "2" / "model.onnx").open("ab") as program:
                program.write(b"x")
            record_published(repository, NAME, 2, live=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "cannot load 'tiny'" in line
        assert "model.onnx has sha256" in line
        check_curl_lines(message)


@pytest.mark.parametrize("made", [False, True])
def test_empty_repository_names_the_remedy(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "model_repo").mkdir()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model_repo"), str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode != 0
    assert "holds no published model. Make one with: python -m flows.train" in outcome.stderr


@pytest.mark.parametrize("content", [None, "", "-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n"])
def test_a_certificate_that_cannot_be_used_is_said_before_anything_starts(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "cert.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ConfigError, match=r"serve.tls_certificate_path=.* cannot be used: .* with the certificate and its key"
    ):
        check_public(ServeConfig(replicas=1, drift_port=0, tls_certificate_path=path))


def test_ports_and_addresses_are_looked_at_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"serve.openai_port={port} cannot be bound on 127.0.0.1.*openai_port=0"):
            check_public(ServeConfig(drift_port=0, openai_port=port))
    elsewhere = ServeConfig(drift_port=0, host="192.0.2.1", accept_unguarded_ports=True)  # of documentation (RFC 5737)
    with pytest.raises(ConfigError, match=r"serve.host=192.0.2.1 cannot be used for serve.drift_port: .*0\.0\.0\.0"):
        check_public(elsewhere)
    with pytest.raises(ConfigError, match=r"serve.api_keys_path=.* does not exist"):
        check_public(ServeConfig(drift_port=0, openai_port=0, api_keys_path=tmp_path / "none.txt"))
