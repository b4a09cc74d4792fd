"""What is handed to Slurm and Kubernetes: as reviewed in golden/, valid by their own rules, not submitted unasked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from flows.config import ConfigError
from flows.config.launcher import KubernetesConfig, LauncherConfig, LauncherKind, SlurmConfig
from flows.launcher import NotSubmitted, launch_ranks
from flows.launcher.check import check_launcher
from flows.launcher.kubernetes import trainjob
from flows.launcher.slurm_script import slurm_script

GOLDEN = Path(__file__).parent / "golden"
LOGS = Path("/mnt/artifacts/store/base-0123456789abcdef0123.partial/logs")
SBATCH_OPTIONS = {
    *("account", "chdir", "constraint", "cpus-per-task", "gpus-per-node", "job-name", "nodes", "ntasks-per-node"),
    *("open-mode", "output", "partition", "qos", "requeue", "signal", "time"),
}
"""The ones in use, each of them an option of sbatch(1) of Slurm 22.05 and later."""


def launcher(kind: LauncherKind, **settings: Any) -> LauncherConfig:
    return LauncherConfig(kind=kind, num_nodes=2, num_ranks=8, **settings)


GPU_JOB = launcher(
    LauncherKind.slurm,
    slurm=SlurmConfig(
        partition="gpu", account="lab", directives=["--constraint=a100"], setup=["module load cuda/12.8"]
    ),
)
CPU_JOB = LauncherConfig(kind=LauncherKind.slurm, num_ranks=2, threads_per_rank=4, gpus_per_rank=0)
VOLUME = {"image": "registry.example.com/millrace:1.0", "volume_claim": "artifacts", "volume_mount": "/mnt/artifacts"}
TRAINJOB = launcher(
    LauncherKind.kubernetes,
    network_interface="eth0",
    kubernetes=KubernetesConfig(cpus_per_node=64, memory_per_node="512Gi", **VOLUME),
)


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts name the directory and the environment that they are made in."""
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "executable", "/srv/venv/bin/python")
    monkeypatch.delenv("PYTHONPATH", raising=False)


def golden(name: str, made: str) -> None:
    path = GOLDEN / name
    assert made == path.read_text(), f"if the change is meant: write this into {path}\n{made}"


@pytest.mark.parametrize(("name", "config"), [("gpu.sbatch", GPU_JOB), ("cpu.sbatch", CPU_JOB)])
def test_the_slurm_script_is_the_reviewed_one_and_valid(name: str, config: LauncherConfig) -> None:
    script = slurm_script("flows.training", LOGS / "run.json", config, LOGS)
    golden(name, script)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(directives)] == [f"#SBATCH --{directive}" for directive in directives]  # else unread
    assert {directive.partition("=")[0] for directive in directives} <= SBATCH_OPTIONS
    assert all(value for name, _, value in (d.partition("=") for d in directives) if name != "requeue")


def test_the_trainjob_is_the_reviewed_one_and_valid() -> None:
    manifest = trainjob("flows.training", LOGS / "run.json", TRAINJOB, LOGS)
    golden("trainjob.json", json.dumps(manifest, indent=2) + "\n")
    read = TrainerV1alpha1TrainJob.from_dict(manifest)
    assert read is not None
    assert read.to_dict() == manifest  # nothing that the API does not know, nothing of a wrong type
    assert len(manifest["metadata"]["name"]) <= 63


@pytest.mark.parametrize(
    ("config", "file", "command"),
    [
        (LauncherConfig(kind=LauncherKind.slurm, submit=False), "job.sbatch", "sbatch"),
        (
            LauncherConfig(kind=LauncherKind.kubernetes, submit=False, kubernetes=KubernetesConfig(**VOLUME)),
            "trainjob.json",
            "kubectl create -f",
        ),
    ],
    ids=["slurm", "kubernetes"],
)
def test_what_would_be_submitted_can_be_looked_at(
    config: LauncherConfig, file: str, command: str, tmp_path: Path
) -> None:
    check_launcher(config)  # needs no cluster here
    with pytest.raises(NotSubmitted, match=f"launcher.submit=false: .*{file} is written .* `{command} .*{file}`"):
        launch_ranks("flows.training", tmp_path / "run.json", config, tmp_path)
    assert (tmp_path / file).stat().st_size


@pytest.mark.parametrize("config", [GPU_JOB, TRAINJOB], ids=["slurm", "kubernetes"])
def test_a_missing_command_is_said_before_anything_runs(
    config: LauncherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"launcher.kind=\w+ needs (sbatch|kubectl), which is not on the PATH"):
        check_launcher(config)
