"""Ranks on the hosts of a DeepSpeed hostfile, over ssh.

DeepSpeed's own launcher is left out: it ignores SIGTERM, leaves ranks behind and can report success for a killed one.
Here one ssh connection per host carries `python -m flows.launcher.host`, which starts that host's ranks and lives no
longer than the connection. All hosts have this checkout, its environment and the artifacts under the same paths.
"""

from __future__ import annotations

import json
import os
import selectors
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.config import ConfigError
from flows.config.launcher import LauncherConfig
from flows.launcher.local import process_environment, rank_command
from flows.launcher.outcome import RankError
from flows.launcher.sessions import stop_sessions

PASSED_ON = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_TOKEN", "WANDB_API_KEY")
"""Environment variables that ranks get from here, besides those of `PASSED_PREFIXES`."""
PASSED_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "MILLRACE_")
ALIVE_INTERVAL_S = 5.0
"""This often a host is told that somebody still waits for its ranks."""
CONNECT_TIMEOUT_S = 15
STARTUP_TIMEOUT_S = 60.0
"""Seconds until a host has connected and started Python."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the order of the file: lines `host slots=8`, `#` starts a comment.

    Raises:
        ConfigError: The file is missing, a line is none of these, or a host stands there twice.
    """
    if not path.is_file():
        raise ConfigError(f"launcher.hostfile={path} is not a file. Write one with lines such as: node1 slots=8.")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, value = words[-1].split("=") if len(words) == 2 and words[1].count("=") == 1 else ("", "")
        if name != "slots" or not value.isdigit() or words[0] in hosts:
            raise ConfigError(
                f"launcher.hostfile={path}: line {number} is {line.strip()!r}, and each one must read `host slots=8`, "
                "each host once. Mend that line."
            )
        hosts[words[0]] = int(value)
    return hosts


def chosen_hosts(config: LauncherConfig) -> list[str]:
    """The hosts that ranks run on: the first `num_nodes` of the file.

    Raises:
        ConfigError: There are too few of them, or one has too few slots.
    """
    if config.hostfile is None:
        raise AssertionError("the configuration has been checked")
    slots = read_hostfile(config.hostfile)
    chosen = list(slots)[: config.num_nodes]
    if len(chosen) < config.num_nodes:
        raise ConfigError(
            f"launcher.num_nodes={config.num_nodes} needs as many hosts, and launcher.hostfile={config.hostfile} has "
            f"{len(slots)}. Set launcher.num_nodes={len(slots)}."
        )
    for host in chosen:
        if slots[host] < config.num_ranks:
            raise ConfigError(
                f"launcher.num_ranks={config.num_ranks} needs as many slots on each host, and {host} has {slots[host]} "
                f"in launcher.hostfile={config.hostfile}. Set launcher.num_ranks={slots[host]}."
            )
    return chosen


class _Host:
    """One ssh connection and the ranks at its other end."""

    def __init__(self, name: str, ssh_options: list[str], log_path: Path) -> None:
        self.name = name
        self.codes: dict[int, int] = {}
        self.log_path = log_path
        remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(sys.executable)} -m flows.launcher.host"
        if path := os.environ.get("PYTHONPATH"):
            remote = f"export PYTHONPATH={shlex.quote(path)}; {remote}"
        command = [
            *("ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}"),
            *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
            *(*ssh_options, name, remote),
        ]
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True, bufsize=0
            )
        self._rest = b""

    def say(self, message: Mapping[str, Any]) -> None:
        """Sends one line of JSON; a connection that is gone shows when its answers are read."""
        if self.process.stdin is None:
            raise AssertionError("opened as a pipe")
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def hear(self, timeout_s: float) -> list[dict[str, Any]]:
        """Messages that have arrived.

        Raises:
            RankError: The connection is gone.
        """
        if self.process.stdout is None:
            raise AssertionError("opened as a pipe")
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return []
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            said = self.log_path.read_text(errors="replace").strip()
            raise RankError(f"the connection to {self.name} is gone (ssh ended with {self.process.wait()}): {said}")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [json.loads(line) for line in lines]


class HostRanks:
    """The ranks of all hosts.

    Raises:
        RankError: A host cannot be reached, or does not start Python in time.
    """

    def __init__(self, module: str, argument: Path, config: LauncherConfig, log_dir: Path) -> None:
        self._config = config
        self._log_dir = log_dir
        self._told_at = 0.0
        hosts = chosen_hosts(config)
        self._hosts: list[_Host] = []
        try:
            for name in hosts:
                self._hosts.append(_Host(name, config.ssh_options, log_dir / f"host-{name}.log"))
            ports = [self._wait_for_port(host) for host in self._hosts]
            passed = {
                name: value
                for name, value in os.environ.items()
                if name in PASSED_ON or name.startswith(PASSED_PREFIXES)
            }
            for node, host in enumerate(self._hosts):
                host.say(
                    {
                        "command": rank_command(module, argument.absolute()),
                        "first_rank": node * config.num_ranks,
                        "ranks": config.num_ranks,
                        "threads_per_rank": config.threads_per_rank,
                        "log_dir": str(log_dir.absolute()),
                        "environment": {
                            **passed,
                            "WORLD_SIZE": str(config.world_size),
                            "MASTER_ADDR": hosts[0].rpartition("@")[2],
                            "MASTER_PORT": str(ports[0]),
                            **process_environment(config),
                        },
                    }
                )
        except BaseException:
            self.stop()
            raise

    def _wait_for_port(self, host: _Host) -> int:
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while time.monotonic() < deadline:
            for message in host.hear(deadline - time.monotonic()):
                return int(message["free_port"])
        raise RankError(f"{host.name} did not start Python within {STARTUP_TIMEOUT_S:g} s of connecting")

    def running(self) -> bool:
        """Whether any rank is, as far as the hosts have said.

        Raises:
            RankError: A connection is gone.
        """
        if time.monotonic() - self._told_at > ALIVE_INTERVAL_S:
            self._told_at = time.monotonic()
            for host in self._hosts:
                host.say({"alive": True})
        for host in self._hosts:
            while len(host.codes) < self._config.num_ranks and (messages := host.hear(0)):
                for message in messages:
                    host.codes[message["rank"]] = message["exit_code"]
        return len(self.exit_codes()) < self._config.world_size

    def at_work(self) -> bool:
        """Always."""
        return True

    def exit_codes(self) -> dict[int, int]:
        """By rank, of those that have ended."""
        return {rank: code for host in self._hosts for rank, code in host.codes.items()}

    def ask_to_save(self) -> None:
        """Has SIGTERM sent on each host."""
        for host in self._hosts:
            host.say({"save": True})

    def stop(self) -> None:
        """Cuts the connections; the hosts end their ranks."""
        stop_sessions([host.process for host in self._hosts], 0)

    def log_path(self, rank: int) -> Path:
        """`rank-<n>.log`, written by the host on the shared file system."""
        return self._log_dir / f"rank-{rank}.log"
