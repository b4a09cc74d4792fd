"""What can be known before a run about whether its ranks can be started."""

from __future__ import annotations

import shutil

from flows.config import ConfigError
from flows.config.launcher import LauncherConfig, LauncherKind
from flows.launcher.hostfile import chosen_hosts
from flows.launcher.slurm import check_submission

PROGRAMS = {
    LauncherKind.hostfile: ("ssh", "Install an ssh client (Debian: openssh-client), or set launcher.kind=local."),
    LauncherKind.slurm: (
        "sbatch",
        "Run this where Slurm's commands are, or set launcher.submit=false to write the script only.",
    ),
    LauncherKind.kubernetes: (
        "kubectl",
        "Run this where kubectl is, or set launcher.submit=false to write the manifest only.",
    ),
}


def check_launcher(config: LauncherConfig) -> None:
    """Raises ConfigError if a program that starts the ranks is missing, the hostfile does not fit, or Slurm refuses."""
    program, remedy = PROGRAMS.get(config.kind, ("", ""))
    if program and config.submit and shutil.which(program) is None:
        raise ConfigError(f"launcher.kind={config.kind} needs {program}, which is not on the PATH. {remedy}")
    if config.kind == LauncherKind.hostfile:
        chosen_hosts(config)
    if config.kind == LauncherKind.slurm and config.submit:
        check_submission(config)
