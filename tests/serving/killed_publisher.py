"""Publishes version 2 again and again, in children that kill themselves before their n-th file operation.

Prints, for every n, what the killed publisher left and what the next one made of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from flows.artifact import Artifact
from flows.config.serving import PublishConfig
from flows.serving import config_pbtxt, entry, publish
from flows.serving.repository import complete_versions, version_dirs

WATCHED = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile"}


def publish_one(root: Path, name: str, plan: tuple[str, str, str]) -> None:
    entry_path, passport_path, digest = plan
    parents = {
        "entry": Artifact("entry", "", digest, Path(entry_path)),
        "passport": Artifact("passport", "", "", Path(passport_path)),
    }
    (root / "artifact").mkdir(exist_ok=True)
    publish.build(root / "artifact", PublishConfig(model_name=name, model_repo=root / "repo"), parents)


def in_child(work: Any) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before(step: int, root: Path) -> None:
    """Ends this process just before its `step`-th operation on a file below `root`."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in WATCHED and any(str(root) in str(argument) for argument in arguments):
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


def look(repository: Path, name: str) -> dict[str, Any]:
    complete = complete_versions(repository, name)
    damaged = []
    for model in (name, f"{name}_text"):
        config_pbtxt.parse((repository / model / "config.pbtxt").read_text())
        for version in version_dirs(repository / model):
            listed, found = entry.read_files(version), entry.version_digests(version)
            damaged += (
                [f"{version}/{file}" for file in listed if listed[file] != found[file]] if listed else [str(version)]
            )
    return {"complete": complete, "damaged": damaged}


def try_step(step: int, here: Path, name: str, plan: list[tuple[str, str, str]]) -> tuple[bool, dict[str, Any]]:
    """Whether the publisher was killed at this step, and what came of it."""
    shutil.copytree(here.with_name("base"), here)

    def killed() -> None:
        kill_before(step, here / "repo")
        publish_one(here, name, plan[1])

    code = in_child(killed)
    result = look(here / "repo", name)
    assert in_child(lambda: publish_one(here, name, plan[1])) == 0
    staged = Path(plan[1][0]) / "repo"
    result["repaired"] = {
        **look(here / "repo", name),
        "left_over": [str(path) for path in (here / "repo").rglob("*.partial")],
        "settings_equal": all(
            (here / "repo" / model / path).read_bytes() == (staged / model / path).read_bytes()
            for model in (name, f"{name}_text")
            for path in publish._settings(staged / model)
        ),
    }
    return code == -signal.SIGKILL, result


def main() -> None:
    root, name, plan = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    results: list[dict[str, Any]] = []
    (root / "base").mkdir(parents=True)
    publish_one(root / "base", name, plan[0])
    was_killed = True
    while was_killed:  # once there are no more steps, it comes to its end
        was_killed, result = try_step(len(results), root / str(len(results)), name, plan)
        results.append(result)
    print(json.dumps(results))


main()
