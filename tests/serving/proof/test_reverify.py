"""`python -m flows.verify`: what was published is proven again, and what was changed since is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import verify as verb
from flows.artifact import digest_file
from flows.config import ConfigError
from flows.serving.endpoint import Endpoint
from flows.serving.installation import ServerError
from flows.serving.proof.passport import PassportError, _check_loaded
from flows.serving.proof.reverify import check_files, read_proven, verify_version, version_place
from flows.serving.server import InferenceServer
from tests.serving.tiny_chain import NAME, Published

pytestmark = pytest.mark.server


def test_a_version_is_proven_again_on_a_server_of_its_own(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = verb.main(
        [str(published.repository / NAME), "--artifacts", str(published.artifacts), "--out", str(tmp_path / "out.json")]
    )
    said = capsys.readouterr().out
    assert code == 0, said
    assert "tiny version 1 is the model that was trained" in said
    found = json.loads((tmp_path / "out.json").read_text())
    before = json.loads((published.repository / NAME / "1" / "passport.json").read_text())
    assert found["passed_by_check"].keys() - before["passed_by_check"].keys() == {"passport", "lineage", "loads"}
    assert found["skipped"] == {}
    assert found["seeds"]["fresh"] != before["seeds"]["fresh"]
    assert {row["details"]["transport"] for row in found["rows"] if row["name"] == "scores"} == {
        "http",
        "grpc",
        "shared memory",
    }


def test_a_running_server_is_asked(
    published: Published, server: InferenceServer, capsys: pytest.CaptureFixture[str]
) -> None:
    at = server.endpoint
    words = [str(published.repository / NAME / "1"), "--artifacts", str(published.artifacts)]
    assert verb.main([*words, "--http", at.http, "--grpc", at.grpc]) == 0
    said = capsys.readouterr().out
    assert "left out: this server lets only who started it register memory" in said
    assert "left out: nobody said where this server's metrics are" in said


def replace_weights(repository: Path, artifacts: Path) -> None:
    with (repository / NAME / "1" / "model.onnx").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))


def replace_weights_and_listing(repository: Path, artifacts: Path) -> None:
    replace_weights(repository, artifacts)
    version = repository / NAME / "1"
    listed = json.loads((version / "files.json").read_text())
    listed["model.onnx"] = digest_file(version / "model.onnx")
    (version / "files.json").write_text(json.dumps(listed))


def replace_passport(repository: Path, artifacts: Path) -> None:
    path = repository / NAME / "1" / "passport.json"
    path.write_text(path.read_text().replace('"noise_factor": 4.0', '"noise_factor": 1e9'))


def replace_config(repository: Path, artifacts: Path) -> None:
    path = repository / NAME / "config.pbtxt"
    path.write_text(path.read_text().replace("max_batch_size: 3", "max_batch_size: 4"))


def cut_the_way_back(repository: Path, artifacts: Path) -> None:
    (corpus,) = (artifacts / "store").glob("corpus-*")
    shutil.rmtree(corpus)


@pytest.mark.parametrize(
    ("change", "check", "told"),
    [
        (replace_weights, "digests", "tiny/1/model.onnx is not what was exported"),
        (replace_weights_and_listing, "digests", "tiny/1/files.json, tiny/1/model.onnx is not what was exported"),
        (replace_passport, "passport", "was not made by any run of"),
        (replace_config, "config", "max_batch_size is 4, not 3"),
        (cut_the_way_back, "lineage", "corpus-"),
    ],
)
def test_what_was_changed_after_publishing_is_named(
    published: Published, tmp_path: Path, change: Callable[[Path, Path], None], check: str, told: str
) -> None:
    repository = published.copy(tmp_path / "repo")
    artifacts = Path(shutil.copytree(published.artifacts, tmp_path / "artifacts", copy_function=os.link))
    change(repository, artifacts)
    proven = read_proven(repository, NAME, 1, artifacts / "store")
    failed = [one for one in check_files(proven) if not one.passed]
    assert {one.name for one in failed} == {check}
    assert told in failed[0].details["failure"]


def test_what_the_server_loaded_is_compared_with_what_was_proven(published: Published, server: InferenceServer) -> None:
    loaded = server.endpoint.loaded_files()
    on_disk = {
        (name, "1"): digest_file(published.repository / name / "1" / "files.json") for name in (NAME, f"{NAME}_text")
    }
    assert loaded == on_disk
    expected = read_proven(published.repository, NAME, 1, published.store).expect()
    listings = {NAME: "0" * 64, f"{NAME}_text": on_disk[f"{NAME}_text", "1"]}
    (bad, good), _ = _check_loaded(server.endpoint, "1", expected, listings)
    assert (bad.passed, good.passed) == (False, True)
    assert bad.details["failure"].endswith("when it was loaded, not 000000000000")


def test_what_cannot_be_verified_is_said(published: Published, server: InferenceServer, tmp_path: Path) -> None:
    for name in (f"../{NAME}", "..", f"{NAME}/../{NAME}", "", "/etc"):
        with pytest.raises(ConfigError, match="is not in"):
            version_place(published.repository, name, 1)
    with pytest.raises(ConfigError, match="version=tiny/2 is not in"):
        verify_version(published.repository, NAME, 2, published.store)
    with pytest.raises(PassportError, match=r"does not hold what .*tokens .* is not there.*Name the store"):
        verify_version(published.repository, NAME, 1, tmp_path)
    repository = published.copy(tmp_path / "repo")
    for model in (NAME, f"{NAME}_text"):
        (repository / model / "1").rename(repository / model / "7")
    at = server.endpoint
    with pytest.raises(ServerError, match=r"does not serve version 7 of tiny"):
        verify_version(repository, NAME, 7, published.store, endpoint=Endpoint(at.http, at.grpc))
    (repository / NAME / "7" / "passport.json").write_text("{}")
    with pytest.raises(PassportError, match=r"does not say how it was made.*Publish the model again"):
        verify_version(repository, NAME, 7, published.store)
