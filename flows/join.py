"""The other nodes of a rendezvous: they join the training stages of a run that the leading node's flow runs.

`python -m flows.train` with the same words on all nodes ends here on those that are not `launcher.rendezvous_endpoint`.
They walk the same chain over the same artifacts, wait for what the leading node makes, start their share of the ranks
when it does, and end when no training stage is left.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.artifact import MANIFEST, Artifact, ArtifactStore, Stage, load_artifact
from flows.chain import run_chain
from flows.config import Config, RunError
from flows.launcher import EXIT_PREEMPTED, Preempted
from flows.launcher.rendezvous import INVITATION, Node
from flows.run_record import run_dir

POLL_INTERVAL_S = 0.5
TRAINING = "flows.training.stage"

logger = logging.getLogger(__name__)


class _NoTrainingLeft(Exception):
    """The last training stage is made."""


def join(config: Config) -> None:
    """Takes part in every training stage of the run.

    Raises:
        RunError: No flow of this name runs on the leading node, or it has ended before its last training stage.
        Preempted: The ranks were asked to stop and have saved.
    """
    member = Member(config)
    try:
        run_chain(config, member.take_part)
    except _NoTrainingLeft:
        print("The training stages are done; the leading node goes on alone.")


class Member:
    """This node's part in a run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._store = ArtifactStore(config.artifacts_dir / "store")
        self._training_left = list(config.trained_candidates)
        self._joined: str | None = None
        self._last_code = 0

    def take_part(self, stage: Stage) -> Artifact:
        """The stage's artifact, once the leading node has made it, with our ranks if it is a training stage."""
        if not self._training_left:
            raise _NoTrainingLeft
        key = self._store.key(stage)
        waited_since = time.monotonic()
        while True:
            led = leading(self._config)  # asked first: the leading node may make the stage and end in between
            if (self._store.root / key / MANIFEST).exists():
                break
            if stage.module == TRAINING:
                self._join_if_invited(self._store.workplace(stage) / "logs")
            waited_s = time.monotonic() - waited_since
            if led:
                waited_since = time.monotonic()
            elif self._joined or waited_s > self._config.launcher.rendezvous_timeout_s:
                self._give_up(stage)
            time.sleep(POLL_INTERVAL_S)
        if stage.module == TRAINING:
            self._training_left.remove(stage.name)
        return load_artifact(self._store.root / key)

    def _join_if_invited(self, log_dir: Path) -> None:
        invitation = _read(log_dir / INVITATION)
        if invitation is None or invitation["id"] == self._joined:
            return
        self._joined = invitation["id"]
        launcher = self._config.launcher
        node = Node(
            launcher,
            invitation["module"],
            Path(invitation["argument"]),
            log_dir,
            invitation["id"],
            launcher.rendezvous_endpoint,
        )
        try:
            while node.running() and _read(log_dir / INVITATION) == invitation:
                time.sleep(POLL_INTERVAL_S)
            self._last_code = max(node.exit_codes().values(), default=0)
        except BaseException:
            node.ask_to_save()
            raise
        finally:
            node.stop()

    def _give_up(self, stage: Stage) -> None:
        if self._last_code == EXIT_PREEMPTED:
            raise Preempted("the ranks were sent SIGTERM, saved a checkpoint and stopped")
        raise RunError(
            f"{stage.name}: no flow named {self._config.name} runs on the node of launcher.rendezvous_endpoint="
            f"{self._config.launcher.rendezvous_endpoint}; its own words say why. Give the same command to all nodes."
        )


@contextmanager
def lead(config: Config) -> Iterator[None]:
    """While this lasts, nodes that join know that the flow runs."""
    with _lock_file(config).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def leading(config: Config) -> bool:
    """Whether the leading node's flow runs; the kernel lets go of its lock however it ends."""
    with _lock_file(config).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _lock_file(config: Config) -> Path:
    path = run_dir(config) / ".leading.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _read(path: Path) -> dict[str, Any] | None:
    try:
        invitation: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return invitation
