"""Fault drill: breaks a run in every way that runs break, goes on with it, and compares the loss curves.

    python -m flows.drill                              # one rank, ZeRO-1, a small model; two minutes
    python -m flows.drill engine=zero2 launcher=two_ranks
    python -m flows.drill launcher=rendezvous                # kills torchrun too

Takes the words of `flows.train`, for the ranks and the engine that you mean to use. Works in a temporary directory with
real processes: a child makes the data and trains the base model, with its ranks; the drill kills, damages and starves
it, and starts it again. Prints what happened, what its user saw, and whether the loss curve came out as without faults.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.chain import run_chain
from flows.compose import compose_config, run_cli
from flows.config import Config, RunError, to_json
from flows.config.launcher import LauncherKind
from flows.launcher import launch_ranks

MODEL = "+experiment=smoke"
RUN = [
    "steps=int8",
    "train.max_steps=60",
    "train.warmup_steps=5",
    "train.checkpoint_interval_steps=5",
    "train.eval_interval_steps=30",
    "train.log_interval_steps=1",
]
TRAIN = "import sys; from flows.drill import train_base; train_base(sys.argv[1:])"
A_RANK, LAUNCHER, FLOW = "a rank", "the launcher", "the flow"
DEADLINE_S = 600.0
RANKS_END_S = 20.0
POLL_INTERVAL_S = 0.002


class _TrainedError(Exception):
    """The base model is there; the rest of the chain is not needed."""


def train_base(words: list[str]) -> None:
    """What a child of the drill does: makes the chain up to the base model."""
    config = compose_config(words)
    store = ArtifactStore(config.artifacts_dir / "store")

    def make(stage: Stage) -> Artifact:
        artifact = store.make(stage)
        if stage.name == "base":
            print(json.dumps(artifact.metrics["curve"]))
            raise _TrainedError
        return artifact

    try:
        run_chain(config, make)
    except _TrainedError:
        return
    except RunError as error:
        sys.exit(f"error: {error}")


class Child:
    """A process that trains the base model in an artifacts directory, with its ranks."""

    def __init__(self, words: list[str], directory: Path, file_bytes: int | None = None) -> None:
        self._errors = directory / "errors.txt"
        self._ranks: list[int] = []
        command = [sys.executable, "-c", TRAIN, *words, f"artifacts_dir={directory}"]
        limit = partial(_limit_files, file_bytes) if file_bytes else None
        directory.mkdir(parents=True, exist_ok=True)
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=limit
            )

    def wait_for(self, happens: Callable[[], Any]) -> None:
        """Returns when it happens, or when the process has ended."""
        deadline = time.monotonic() + DEADLINE_S
        while self._process.poll() is None and not happens():
            if time.monotonic() > deadline:
                self._process.kill()
                raise RunError(f"the drill waited {DEADLINE_S:.0f} s in vain.")
            time.sleep(POLL_INTERVAL_S)

    def kill(self, victim: str) -> bool:
        """Sends SIGKILL to its last rank, what started that, or itself; False if there is none any more."""
        self._ranks = _processes_below(self._process.pid)
        victims = {A_RANK: self._ranks[-1:], LAUNCHER: self._ranks[:1], FLOW: self._ranks and [self._process.pid]}
        for pid in victims[victim]:
            os.kill(pid, signal.SIGKILL)
        return bool(self._ranks)

    def finish(self) -> tuple[list[float], str]:
        """Its training losses, none if it failed, and what its user saw in the end."""
        output, _ = self._process.communicate()
        deadline = time.monotonic() + RANKS_END_S
        while left := [pid for pid in self._ranks if Path(f"/proc/{pid}").exists()]:
            if time.monotonic() > deadline:
                return [], f"ranks left behind: {left}"
            time.sleep(POLL_INTERVAL_S)
        curve = json.loads(output.splitlines()[-1]) if self._process.returncode == 0 else []
        losses = [event["train_loss"] for event in curve if "train_loss" in event]
        said = [line for line in self._errors.read_text().splitlines() if line.startswith("error: ")]
        return losses, said[-1] if said else "" if losses else "Killed"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    seen: str
    """What the user saw when it happened."""
    outcome: str
    good: bool


def drill(config: Config) -> None:
    """Runs the drill and prints its table.

    Raises:
        RunError: A run did not come out as without faults.
    """
    words = [*([] if any("experiment=" in word for word in sys.argv) else [MODEL]), *sys.argv[1:], *RUN]
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        expected, said = Child(words, whole).finish()
        if not expected:
            raise RunError(f"the run fails without any fault: {said.removeprefix('error: ')}")
        # A flow that starts its ranks itself is their launcher.
        victims = (A_RANK, LAUNCHER, FLOW) if config.launcher.kind == LauncherKind.rendezvous else (A_RANK, FLOW)
        moments = {"between saves": "step-*10/manifest.json", "while it saves": ".step-*1?.partial"}
        breaks = [
            partial(_break_off, f"kill -9 of {victim}, {moment}", words, whole, expected, pattern, victim)
            for victim in victims
            for moment, pattern in moments.items()
        ]
        breaks += [partial(_fill_disk, words, whole, expected), partial(_damage, words, Path(scratch) / "damage")]
        rows = [_told(happens()) for happens in breaks]
    if not all(row.good for row in rows):
        raise RunError(f"{sum(not row.good for row in rows)} of {len(rows)} faults changed the run.")


def _told(row: Row) -> Row:
    print(f"{row.fault}\n    seen:    {row.seen}\n    outcome: {row.outcome}", flush=True)
    return row


def _break_off(fault: str, words: list[str], whole: Path, expected: list[float], moment: str, victim: str) -> Row:
    directory = _without_model(whole, fault)
    child = Child(words, directory)
    child.wait_for(lambda: [*_checkpoints(directory).glob(moment)])
    if not child.kill(victim):
        return Row(fault, "nothing: the run ended before the moment came", "not tried", False)
    _, seen = child.finish()
    return Row(fault, seen, *_go_on(words, directory, expected))


def _fill_disk(words: list[str], whole: Path, expected: list[float]) -> Row:
    """Files may grow to half of what a checkpoint needs: for the writer, the disk is full."""
    fault = "disk full while it saves"
    directory = _without_model(whole, fault)
    child = Child(words, directory)
    child.wait_for(lambda: [*_checkpoints(directory).glob("step-*10/manifest.json")])
    child.kill(A_RANK)
    child.finish()
    before = {path.name for path in _checkpoints(directory).glob("step-*")}
    needed = max(path.stat().st_size for path in _checkpoints(directory).glob("step-*/*.safetensors"))
    _, seen = Child(words, directory, file_bytes=needed // 2).finish()
    if not before <= {path.name for path in _checkpoints(directory).glob("step-*")}:
        return Row(fault, seen, "an earlier checkpoint is gone", False)
    return Row(fault, seen, *_go_on(words, directory, expected))


def _damage(words: list[str], directory: Path) -> Row:
    from flows.training.damage_drill import CUTS, FLIPS, DamageJob  # imports torch and DeepSpeed

    fault = f"{CUTS} cuts, {FLIPS} flipped bits, missing files, in a checkpoint that was complete"
    directory.mkdir()
    job = DamageJob(run=compose_config(words).training_runs()["base"], directory=directory)
    (directory / "run.json").write_text(to_json(job))
    launch_ranks("flows.training.damage_drill", directory / "run.json", job.run.launcher, directory / "logs")
    outcomes: dict[str, str] = json.loads((directory / "outcomes.json").read_text())
    bad = {name: outcome for name, outcome in outcomes.items() if outcome != "ok"}
    told = [line for path in (directory / "logs").glob("*.log") for line in path.read_text().splitlines()]
    seen = next((line for line in told if "is damaged" in line), "nothing")
    outcome = f"{len(outcomes) - len(bad)} of {len(outcomes)}: passed over, losses equal bit for bit"
    return Row(fault, seen, f"{outcome}; {bad}" if bad else outcome, not bad)


def _go_on(words: list[str], directory: Path, expected: list[float]) -> tuple[str, bool]:
    losses, said = Child(words, directory).finish()
    if not losses:
        return f"the same command fails: {said}", False
    (manifest,) = directory.glob("store/base-*/manifest.json")
    at = json.loads(manifest.read_text())["metrics"]["resumed_from_step"]
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    return f"goes on from step {at}; largest difference of {len(losses)} losses: {worst:g}", worst == 0


def _without_model(whole: Path, name: str) -> Path:
    """A copy of the artifacts directory of the run without faults, before it had trained."""
    copy = whole.with_name("".join(letter for letter in name if letter.isalnum()))  # Hydra reads it: no commas
    return Path(shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("base-*")))


def _checkpoints(directory: Path) -> Path:
    return next(directory.glob("store/base-*.partial/checkpoints"), directory / "none")


def _processes_below(pid: int) -> list[int]:
    """Process ids of what `pid` started, directly or not, to train: torchrun first, if it runs, the last rank last."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = []
    for other in sorted(parents):
        ancestor = other
        while ancestor in parents and ancestor != pid:
            ancestor = parents[ancestor]
        with suppress(OSError):
            if ancestor == pid and other != pid and b"flows.training" in Path(f"/proc/{other}/cmdline").read_bytes():
                found.append(other)
    return found


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # a longer write fails with EFBIG; Python ignores SIGXFSZ


if __name__ == "__main__":
    run_cli(drill, __doc__)
