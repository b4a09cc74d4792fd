"""Ranks as a TrainJob of Kubeflow Trainer v2, which followed the training operator's PyTorchJob.

The API is trainer.kubeflow.org/v1alpha1 as of Kubeflow Trainer 2.2 and 2.3: the runtime `torch-distributed` runs one
pod per node and tells torchrun in it, through PET_* variables, how many there are and where they meet.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from flows.config.launcher import LauncherConfig
from flows.launcher.local import process_environment
from flows.launcher.outcome import NotSubmitted, RankError
from flows.launcher.rank import EXIT_PREEMPTED, take_preemption_note

MANIFEST = "trainjob.json"
"""JSON is YAML, and kubectl reads it."""
POLL_INTERVAL_S = 5.0
API_VERSION = "trainer.kubeflow.org/v1alpha1"
CONTAINER, REPLICATED_JOB = "node", "node"
"""What Kubeflow Trainer's runtimes call the training container and its job."""
NAME_LENGTH = 50
"""Kubernetes allows 63; the pods' names are longer than the job's."""


def trainjob(module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> dict[str, Any]:
    """The manifest that runs `python -m module argument` once per rank.

    Args:
        module: What each rank runs with `python -m`.
        argument: File that it is given.
        config: The launcher.
        log_dir: Of this launch, on the volume that all nodes share.
    """
    kubernetes = config.kubernetes
    gpus = config.num_ranks * config.gpus_per_rank
    resources = {
        "nvidia.com/gpu": str(gpus) if gpus else "",
        "cpu": str(kubernetes.cpus_per_node or ""),
        "memory": kubernetes.memory_per_node,
    }
    wanted = {name: amount for name, amount in resources.items() if amount}
    environment = process_environment(config)
    if config.threads_per_rank:
        environment["OMP_NUM_THREADS"] = str(config.threads_per_rank)
    logs = str(log_dir.absolute())
    command = ["python", "-m", "flows.launcher.torchrun", logs, f"--log-dir={logs}/torchrun", "--tee=3"]
    name = re.sub(r"[^a-z0-9]+", "-", f"millrace-{log_dir.parent.name.removesuffix('.partial')}".lower())
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainJob",
        "metadata": {"name": name[:NAME_LENGTH].strip("-"), "namespace": kubernetes.namespace},
        "spec": {
            "runtimeRef": {"name": kubernetes.runtime},
            "trainer": {
                "image": kubernetes.image,
                "command": [*command, "-m", module, str(argument.absolute())],
                "env": [{"name": key, "value": value} for key, value in environment.items()],
                "numNodes": config.num_nodes,
                "numProcPerNode": config.num_ranks,
                **({"resourcesPerNode": {"limits": wanted, "requests": wanted}} if wanted else {}),
            },
            "runtimePatches": [
                {"manager": "millrace.io/launcher", "trainingRuntimeSpec": {"template": {"spec": _pods(config)}}}
            ],
        },
    }


def _pods(config: LauncherConfig) -> dict[str, Any]:
    kubernetes = config.kubernetes
    pod = {
        "terminationGracePeriodSeconds": config.preemption_grace_s + 5,
        "volumes": [{"name": "artifacts", "persistentVolumeClaim": {"claimName": kubernetes.volume_claim}}],
        "containers": [
            {"name": CONTAINER, "volumeMounts": [{"name": "artifacts", "mountPath": kubernetes.volume_mount}]}
        ],
    }
    return {"replicatedJobs": [{"name": REPLICATED_JOB, "template": {"spec": {"template": {"spec": pod}}}}]}


class KubernetesRanks:
    """The ranks of one TrainJob.

    Raises:
        NotSubmitted: `launcher.submit=false`.
        RankError: The cluster refused the manifest.
    """

    def __init__(self, module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._world_size = config.world_size
        manifest = trainjob(module, argument, config, log_dir)
        self._name = manifest["metadata"]["name"]
        self._namespace = config.kubernetes.namespace
        path = log_dir.absolute() / MANIFEST
        path.write_text(json.dumps(manifest, indent=2) + "\n")
        if not config.submit:
            raise NotSubmitted(
                f"launcher.submit=false: {path} is written and not submitted. Submit it with "
                f"`kubectl create -f {path}`; when the job is done, the same command goes on from what it trained."
            )
        self._path = path
        if not self._is_at_work():  # else it is the job of an earlier flow that was killed: ours now
            self._submit()
        self._codes: dict[int, int] = {}
        self._active = False
        self._asked_at = 0.0

    def running(self) -> bool:
        """Whether the job waits or runs.

        Raises:
            RankError: It has failed.
        """
        if time.monotonic() - self._asked_at < POLL_INTERVAL_S:
            return not self._codes
        self._asked_at = time.monotonic()
        status = json.loads(self._kubectl("get", "trainjob", self._name, "--output=json")).get("status", {})
        self._active = any(job.get("active") for job in status.get("jobsStatus", []))
        holds = {item["type"]: item for item in status.get("conditions", []) if item["status"] == "True"}
        if "Complete" in holds:
            self._codes = dict.fromkeys(range(self._world_size), 0)
        elif "Failed" in holds and take_preemption_note(self._log_dir):
            self._submit()  # its pods were evicted and have saved: it queues again
        elif "Failed" in holds:
            spoken = sorted(self._log_dir.glob("rank-*.error"))
            logs = f"kubectl logs --namespace={self._namespace} -l jobset.sigs.k8s.io/jobset-name={self._name}"
            words = f": {spoken[0].read_text().strip()}" if spoken else f"; see `{logs}`"
            reason = f"{holds['Failed'].get('reason')}: {holds['Failed'].get('message')}"
            raise RankError(f"TrainJob {self._name} has failed ({reason}){words}", comes_again=bool(spoken))
        return not self._codes

    def at_work(self) -> bool:
        """Whether pods run."""
        return self._active

    def exit_codes(self) -> dict[int, int]:
        """All zero, once the job has completed; or that the ranks have saved as asked."""
        return self._codes

    def ask_to_save(self) -> None:
        """Deletes the job and waits until its pods are gone: they are sent SIGTERM and get their grace period."""
        self._delete()
        self._active = False
        if take_preemption_note(self._log_dir):
            self._codes = dict.fromkeys(range(self._world_size), EXIT_PREEMPTED)

    def stop(self) -> None:
        """Deletes the job, unless it has completed: then its logs may be of use."""
        if not self._codes:
            self._delete()

    def log_path(self, rank: int) -> Path:
        """Where torchrun keeps the ranks' output on the shared file system."""
        return self._log_dir / "torchrun"

    def _is_at_work(self) -> bool:
        shown = self._kubectl("get", "trainjob", self._name, "--ignore-not-found", "--output=json")
        conditions = json.loads(shown or "{}").get("status", {}).get("conditions", [])
        ended = {item["type"] for item in conditions if item["status"] == "True"} & {"Complete", "Failed"}
        return bool(shown) and not ended

    def _submit(self) -> None:
        self._delete()  # an earlier one: jobs cannot be changed
        self._kubectl("create", "-f", str(self._path))

    def _delete(self) -> None:
        # Foreground: it returns when the pods are gone, too, and none of them trains beside those of a next job.
        self._kubectl("delete", "trainjob", self._name, "--ignore-not-found", "--cascade=foreground")

    def _kubectl(self, *words: str) -> str:
        command = ["kubectl", *words, f"--namespace={self._namespace}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RankError(f"`{shlex.join(command)}` failed: {done.stderr.strip()}")
        return done.stdout
