"""Ranks started by torchrun; nodes meet at a c10d rendezvous.

The leading node, whose address is `launcher.rendezvous_endpoint`, runs the flow. It leaves each launch's id in
`rendezvous.json` in the log directory, on a file system that all nodes share; `flows.join` finds it there.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

from flows.artifact import write_json_atomically
from flows.config.launcher import LauncherConfig, LauncherKind
from flows.launcher.local import process_environment, thread_environment
from flows.launcher.network import address_towards, interface_of, is_here, split_endpoint
from flows.launcher.rank import EXIT_PREEMPTED
from flows.launcher.sessions import free_port, stop_sessions

INVITATION = "rendezvous.json"
MONITOR_INTERVAL_S = 0.2


class Node:
    """torchrun on this machine, with the ranks of this node.

    Args:
        config: The launcher.
        module: What the ranks run.
        argument: Path handed to every rank.
        log_dir: On a file system that all nodes share.
        launch_id: The same on all nodes.
        endpoint: host:port where they meet.
    """

    def __init__(
        self, config: LauncherConfig, module: str, argument: Path, log_dir: Path, launch_id: str, endpoint: str
    ) -> None:
        host, port = split_endpoint(endpoint)
        address = address_towards(host, port)
        self._world_size = config.world_size
        self._log_dir = log_dir
        self._log_path = log_dir / f"node-{socket.gethostname()}-{os.getpid()}.log"
        command = [
            *(sys.executable, "-m", "flows.launcher.torchrun", str(log_dir)),
            f"--nnodes={config.num_nodes}",
            f"--nproc-per-node={config.num_ranks}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={launch_id}",
            f"--rdzv-endpoint={endpoint}",
            # Said, not guessed: torchrun looks for the endpoint among what the host name resolves to.
            f"--rdzv-conf=is_host={str(is_here(host)).lower()},join_timeout={config.rendezvous_timeout_s}",
            f"--local-addr={address}",
            "--max-restarts=0",  # restarts are ours: they begin anew, with all nodes
            f"--monitor-interval={MONITOR_INTERVAL_S}",
            f"--log-dir={log_dir / 'torchrun'}",
            "--tee=3",
            *("-m", module, str(argument)),
        ]
        own = {
            "PARENT_PID": str(os.getpid()),
            "TORCHELASTIC_ERROR_FILE": str(self._log_path.with_suffix(".error.json")),
            **process_environment(config),
            **thread_environment(config),
        }
        if config.num_nodes > 1 and not config.network_interface:
            own["GLOO_SOCKET_IFNAME"] = interface_of(address)  # else gloo takes what the host name resolves to
        with self._log_path.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def running(self) -> bool:
        """Whether torchrun is."""
        return self._process.poll() is None

    def at_work(self) -> bool:
        """Always."""
        return True

    def exit_codes(self) -> dict[int, int]:
        """Once torchrun has ended: the first failure of any node, or the same good end for all ranks."""
        code = self._process.poll()
        if code is None:
            return {}
        if code in (0, EXIT_PREEMPTED):
            return dict.fromkeys(range(self._world_size), code)
        told = [failure for path in self._log_dir.glob("node-*.json") for failure in json.loads(path.read_text())]
        # Ranks that saved, or that were stopped because another had failed, are not the cause.
        causes = [failure for failure in told if failure["exit_code"] not in (EXIT_PREEMPTED, -signal.SIGTERM)]
        if not causes:
            return {0: code}
        first = min(causes, key=lambda failure: int(failure["timestamp"]))
        return {first["rank"]: first["exit_code"]}

    def ask_to_save(self) -> None:
        """Sends SIGTERM to torchrun, which passes it on."""
        self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ends torchrun; its ranks end with it, as do those of the other nodes."""
        stop_sessions([self._process], 0)

    def log_path(self, rank: int) -> Path:
        """Output of all ranks of this node, each line with its local rank."""
        return self._log_path


class LeadingNode(Node):
    """The node that runs the flow: it invites the others."""

    def __init__(self, module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> None:
        self._invitation = log_dir / INVITATION
        launch_id = secrets.token_hex(8)
        endpoint = config.rendezvous_endpoint or f"127.0.0.1:{free_port()}"
        super().__init__(config, module, argument, log_dir, launch_id, endpoint)
        write_json_atomically(self._invitation, {"id": launch_id, "module": module, "argument": str(argument)})

    def stop(self) -> None:
        """Ends torchrun and takes the invitation back."""
        self._invitation.unlink(missing_ok=True)
        super().stop()


def leads(config: LauncherConfig) -> bool:
    """Whether this machine runs the flow, rather than joining one that another machine runs."""
    if config.kind != LauncherKind.rendezvous or config.num_nodes == 1:
        return True
    host, _ = split_endpoint(config.rendezvous_endpoint)
    return is_here(host)
