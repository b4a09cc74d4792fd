"""Where the processes that train run, and what happens when one of them or its machine ends."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from flows.config.checks import require, require_address, require_positive

ELSEWHERE: dict[str, Any] = {"decides_content": False}
"""Metadata of a field that says where or how patiently something runs: what comes out does not depend on it."""

SLURM_WARNING_S = 120
"""SIGTERM comes this long before a Slurm job's time limit; Slurm may send it up to 60 s earlier."""
SHORTEST_SLURM_JOB_S = 600
"""Leaves ranks at least seven minutes to start and train; one that is told to save at once would queue for ever."""


class LauncherKind(StrEnum):
    """Who starts the ranks."""

    local = "local"
    """This process, on this machine."""
    rendezvous = "rendezvous"
    """torchrun; on several nodes the same command is given to each, and they meet at `rendezvous_endpoint`."""
    hostfile = "hostfile"
    """This process, over ssh, on the hosts of a DeepSpeed hostfile."""
    slurm = "slurm"
    """A Slurm job that this process submits and waits for."""
    kubernetes = "kubernetes"
    """A TrainJob of Kubeflow Trainer v2 that this process creates and waits for."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What a Slurm job asks for; nodes, ranks, threads and GPUs follow from the launcher's own settings."""

    partition: str = ""
    """Empty = the cluster's default, here and below."""
    account: str = ""
    """Account that is charged."""
    qos: str = ""
    """Quality of service."""
    time_limit: str = "24:00:00"
    """[days-]hours:minutes:seconds; ranks save two to three minutes before it is over, and the job queues again."""
    directives: list[str] = field(default_factory=list)
    """More #SBATCH options, e.g. [--constraint=a100, --mem=0]."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run before the ranks on the first node, e.g. [module load cuda/12.8]."""

    def __post_init__(self) -> None:
        written = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", self.time_limit)
        days, hours, minutes, seconds = (int(part or 0) for part in written.groups()) if written else (0, 0, 0, 0)
        require(
            ((days * 24 + hours) * 60 + minutes) * 60 + seconds >= SHORTEST_SLURM_JOB_S,
            "launcher.slurm.time_limit",
            self.time_limit or "''",
            f"must be [days-]hours:minutes:seconds of at least {SHORTEST_SLURM_JOB_S} s, as ranks are told to save up "
            f"to {SLURM_WARNING_S + 60} s before it is over",
            "Set launcher.slurm.time_limit=24:00:00.",
        )
        for directive in self.directives:
            require(
                directive.startswith("--") and "\n" not in directive,
                "launcher.slurm.directives",
                self.directives,
                f"holds {directive!r}, and each one must read --option=value",
                "Set launcher.slurm.directives=[--constraint=a100].",
            )


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """What a TrainJob asks for; nodes, ranks and GPUs follow from the launcher's own settings."""

    image: str = ""
    """Container image with Millrace installed and importable; the same version as here."""
    namespace: str = "default"
    """Namespace of the job and of the volume claim."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime; this one is installed by Kubeflow Trainer."""
    volume_claim: str = ""
    """Claim of a volume that all nodes may write, which holds the artifacts."""
    volume_mount: str = ""
    """Where that volume is mounted: the same path here and in the containers, above `artifacts_dir`."""
    cpus_per_node: int = 0
    """Processor cores that each node asks for; 0 leaves it to the runtime."""
    memory_per_node: str = ""
    """Memory that each node asks for, e.g. 256Gi; empty leaves it to the runtime."""


@dataclass(frozen=True, kw_only=True)
class LauncherConfig:
    """The processes that train."""

    kind: LauncherKind = field(default=LauncherKind.local, metadata=ELSEWHERE)
    num_nodes: int = 1
    """Machines."""
    num_ranks: int = 1
    """Processes on each machine; with CUDA, one per GPU."""
    threads_per_rank: int = 0
    """CPU threads of each rank; 0 = the machine's cores shared out evenly, on Slurm one core a rank."""
    stall_timeout_s: int = field(default=600, metadata=ELSEWHERE)
    """Seconds without a sign of life from a rank after which the run is ended as hung, with the ranks' stacks."""
    max_restarts: int = field(default=0, metadata=ELSEWHERE)
    """Times that ranks are started again, from the last checkpoint, after one was killed, crashed or hung; a fault that
    would come again, such as a loss that is not finite, ends the run at once."""
    preemption_grace_s: int = field(default=25, metadata=ELSEWHERE)
    """Seconds that ranks get to save after SIGTERM; Slurm's KillWait, Kubernetes' grace period and Prefect's are 30."""
    rendezvous_endpoint: str = field(default="", metadata=ELSEWHERE)
    """host:port where the nodes of a rendezvous meet; the machine with that address runs the flow, others join it."""
    rendezvous_timeout_s: int = field(default=600, metadata=ELSEWHERE)
    """Seconds that nodes wait for each other at a rendezvous; 600 is torchrun's default."""
    network_interface: str = field(default="", metadata=ELSEWHERE)
    """Network interface between nodes, e.g. ib0; empty = the one that reaches the other nodes."""
    hostfile: Path | None = field(default=None, metadata=ELSEWHERE)
    """Lines `host slots=8`, as DeepSpeed reads them; the first `num_nodes` of them are used."""
    ssh_options: list[str] = field(default_factory=list, metadata=ELSEWHERE)
    """Arguments of ssh before the host, e.g. [-p, "2222"]; your ssh configuration is read too."""
    gpus_per_rank: int = field(default=1, metadata=ELSEWHERE)
    """GPUs that each rank asks of Slurm or Kubernetes; 0 on a cluster of CPUs."""
    submit: bool = field(default=True, metadata=ELSEWHERE)
    """false writes the Slurm script or Kubernetes manifest and stops with the command that submits it."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig, metadata=ELSEWHERE)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig, metadata=ELSEWHERE)

    @property
    def world_size(self) -> int:
        """Ranks on all machines."""
        return self.num_nodes * self.num_ranks

    def __post_init__(self) -> None:
        require_positive("launcher", self, ["num_nodes", "num_ranks", "stall_timeout_s", "preemption_grace_s"])
        require_positive("launcher", self, ["rendezvous_timeout_s"])
        for name in ("threads_per_rank", "max_restarts", "gpus_per_rank"):
            value = getattr(self, name)
            require(value >= 0, f"launcher.{name}", value, "must not be negative", f"Set launcher.{name}=0.")
        require(
            self.num_nodes == 1 or self.kind != LauncherKind.local,
            "launcher.num_nodes",
            self.num_nodes,
            "cannot be started by launcher.kind=local, which knows one machine",
            "Set launcher=rendezvous, hostfile, slurm or kubernetes.",
        )
        require(
            self.submit or self.kind in (LauncherKind.slurm, LauncherKind.kubernetes),
            "launcher.submit",
            self.submit,
            f"has nothing to write for launcher.kind={self.kind}",
            "Set launcher=slurm or launcher=kubernetes.",
        )
        if self.kind == LauncherKind.rendezvous:
            self._check_endpoint()
        require(
            self.hostfile is not None or self.kind != LauncherKind.hostfile,
            "launcher.kind",
            self.kind,
            "needs a list of hosts",
            "Set launcher.hostfile=hosts.txt with lines such as: node1 slots=8.",
        )
        if self.kind == LauncherKind.kubernetes:
            for name, example in (
                ("image", "registry.example.com/millrace:1.0"),
                ("volume_claim", "artifacts"),
                ("volume_mount", "/mnt/artifacts"),
            ):
                require(
                    bool(getattr(self.kubernetes, name)),
                    f"launcher.kubernetes.{name}",
                    "''",
                    "must be given for launcher.kind=kubernetes",
                    f"Set launcher.kubernetes.{name}={example}.",
                )

    def _check_endpoint(self) -> None:
        if self.rendezvous_endpoint or self.num_nodes > 1:
            require_address(
                "launcher.rendezvous_endpoint",
                self.rendezvous_endpoint,
                f"where the launcher.num_nodes={self.num_nodes} nodes meet",
                "Set launcher.rendezvous_endpoint=node1:29400, the address of the node that runs the flow.",
            )
