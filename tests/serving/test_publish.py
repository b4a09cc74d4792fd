from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.artifact import Artifact, digest_file
from flows.config import ConfigError
from flows.serving import publish
from tests.serving.tiny_chain import ENTRY, EXPORT, NAME, Chain, build_entry

pytestmark = pytest.mark.server  # its passports are real
Publish = Callable[[Path, Chain, Artifact], Artifact]
PUBLISHER = Path(__file__).with_name("killed_publisher.py")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "model_repo"


def test_versions_count_up_and_hold_their_passport(
    repository: Path,
    publish_to: Publish,
    chain: Chain,
    passport: Artifact,
    other_chain: Chain,
    other_passport: Artifact,
) -> None:
    first = publish_to(repository, chain, passport)
    assert (first.metrics["version"], first.metrics["is_new"]) == (1, True)
    second = publish_to(repository, other_chain, other_passport)
    assert (second.metrics["version"], second.metrics["is_new"]) == (2, True)
    for version, one in ((1, passport), (2, other_passport)):
        copied = repository / NAME / str(version) / "passport.json"
        assert copied.read_bytes() == (one.path / "passport.json").read_bytes()
    assert (publish.is_current(first), publish.is_current(second)) == (False, True)
    third = publish_to(repository, chain, passport)
    assert third.metrics["version"] == 3, "the run that came last decides what is served"


def test_same_version_is_not_published_again(
    repository: Path, publish_to: Publish, chain: Chain, passport: Artifact
) -> None:
    publish_to(repository, chain, passport)
    again = publish_to(repository, chain, passport)
    assert (again.metrics["version"], again.metrics["is_new"]) == (1, False)


@pytest.mark.parametrize(
    "file", [f"{NAME}/1/model.onnx", f"{NAME}/1/passport.json", f"{NAME}_text/1/model.py", f"{NAME}/config.pbtxt"]
)
def test_damage_is_seen_and_mended(
    repository: Path, publish_to: Publish, chain: Chain, passport: Artifact, file: str
) -> None:
    first = publish_to(repository, chain, passport)
    assert publish.is_current(first)
    with (repository / file).open("ab") as damaged:
        damaged.write(b"{")
    assert not publish.is_current(first)
    mended = publish_to(repository, chain, passport)
    assert publish.is_current(mended)


def test_other_inputs_or_outputs_need_another_name(
    repository: Path, publish_to: Publish, chain: Chain, passport: Artifact
) -> None:
    publish_to(repository, chain, passport)
    config = repository / NAME / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: 280", "dims: 281"))
    before = sorted(repository.rglob("*"))
    with pytest.raises(
        ConfigError, match=f"publish.model_name={NAME} is taken .* differs in output logits.*Set another"
    ):
        publish_to(repository, chain, passport)
    assert sorted(repository.rglob("*")) == before


def test_passport_of_another_entry_is_refused(
    repository: Path, publish_to: Publish, other_chain: Chain, passport: Artifact
) -> None:
    with pytest.raises(publish.PublishError, match="does not say that this entry passed"):
        publish_to(repository, other_chain, passport)
    assert not repository.exists()


def test_killed_at_any_step_leaves_a_whole_repository(chain: Chain, passport: Artifact, tmp_path: Path) -> None:
    """Kills a publisher of version 2 before each of its file operations, looks, and lets another one try again."""
    entries = [
        chain.entry,
        build_entry(tmp_path / "other", chain.made_from, replace(ENTRY, export=replace(EXPORT, threads=2))),
    ]
    plan = []
    for number, entry in enumerate(entries):
        slim = tmp_path / f"slim-{number}"
        shutil.copytree(entry.path, slim)
        version = slim / "repo" / f"{NAME}_text" / "1"
        (version / "tokenizers.abi3.so").write_bytes(b"11 MB less to copy per kill")
        listed = {path.name: digest_file(path) for path in version.iterdir() if path.name != "files.json"}
        (version / "files.json").write_text(json.dumps(listed))
        stated = json.loads((passport.path / "passport.json").read_text())
        stated["digests"]["entry"] = str(number)
        (tmp_path / f"passport-{number}").mkdir()
        (tmp_path / f"passport-{number}" / "passport.json").write_text(json.dumps(stated))
        plan.append([str(slim), str(tmp_path / f"passport-{number}"), str(number)])
    command = [sys.executable, str(PUBLISHER), str(tmp_path / "work"), NAME, json.dumps(plan)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 0, outcome.stderr
    seen = json.loads(outcome.stdout)
    assert len(seen) > 20, "the publisher was not killed at every step"
    for step, one in enumerate(seen):
        assert one["damaged"] == [], f"step {step}"
        assert one["complete"] in ([1], [1, 2]), f"step {step}"
        assert one["repaired"] == {"complete": [1, 2], "damaged": [], "left_over": [], "settings_equal": True}, (
            f"step {step}"
        )
    assert seen[0]["complete"] == [1]
    assert seen[-1]["complete"] == [1, 2]
