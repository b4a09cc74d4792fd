"""One training stage on two hosts, made of network namespaces: the nodes meet, agree, and give what one host gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.artifact import Artifact, load_artifact
from flows.config import to_json
from flows.config.launcher import LauncherConfig, LauncherKind
from flows.config.training import TrainingRun

DEADLINE_S = 120
ADDRESSES = ("10.213.7.1", "10.213.7.2")
NODE = """
import sys
from pathlib import Path
from flows.artifact import Artifact, ArtifactStore, Stage
from flows.config import Config, from_json
from flows.config.training import DistillConfig, TrainingRun
from flows.join import Member, lead
from flows.launcher.rendezvous import leads

run = from_json(TrainingRun, Path(sys.argv[1]).read_text())
artifacts_dir = Path(sys.argv[2])
parents = {name: Artifact(name, name, name, Path(path)) for name, path in zip(("tokens", "tokenizer"), sys.argv[3:])}
config = Config(artifacts_dir=artifacts_dir, launcher=run.launcher)
stage = Stage("base", "flows.training.stage", run, parents)
if leads(run.launcher):
    with lead(config):
        print("made", ArtifactStore(artifacts_dir / "store").make(stage).path)
else:
    print("joined", Member(config).take_part(stage).path)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable, with nothing else to talk to."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and the command ip (Debian: iproute2) to make network namespaces")
    names = [f"millrace-{os.getpid()}-{number}" for number in range(2)]
    ends = [f"mr{os.getpid()}{end}"[-15:] for end in "ab"]
    made = []
    try:
        for name in names:
            added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if added.returncode:
                pytest.skip(f"needs the right to make network namespaces: {added.stderr.strip()}")
            made.append(name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_the_same_command_on_two_hosts_trains_one_model(
    hosts: list[str],
    data: dict[str, Artifact],
    tiny_run: Callable[..., TrainingRun],
    losses: Callable[[Artifact], list[float]],
    trained: Callable[..., Artifact],
    tmp_path: Path,
) -> None:
    launcher = LauncherConfig(
        kind=LauncherKind.rendezvous,
        num_nodes=2,
        threads_per_rank=1,
        rendezvous_endpoint=f"{ADDRESSES[0]}:29400",
        rendezvous_timeout_s=DEADLINE_S,
    )
    run = tiny_run(launcher=launcher, max_steps=6, eval_interval_steps=6)
    (tmp_path / "node.py").write_text(NODE)
    (tmp_path / "run.json").write_text(to_json(run))
    command = [sys.executable, "node.py", "run.json", str(tmp_path / "artifacts")]
    inputs = [str(data[name].path) for name in ("tokens", "tokenizer")]
    nodes = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *command, *inputs],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in reversed(hosts)  # the one that joins is there first
    ]
    try:
        said = [node.communicate(timeout=DEADLINE_S)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "joined" in said[0]
    assert "made" in said[1]
    made = load_artifact(Path(said[1].split()[-1]))
    assert len(list((made.path / "logs").glob("node-*.log"))) == 2
    assert losses(made) == losses(trained(tiny_run(ranks=2, max_steps=6, eval_interval_steps=6)))
