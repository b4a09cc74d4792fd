from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flows.artifact import Artifact, digest_file
from flows.serving.proof import verify_stage
from tests.serving import tiny_model
from tests.serving.tiny_chain import EXPORT, NAME, PASSPORT, Chain, build_entry

pytestmark = pytest.mark.server


def test_good_version_gets_a_passport(chain: Chain, passport: Artifact, other_passport: Artifact) -> None:
    stated = json.loads((passport.path / "passport.json").read_text())
    other = json.loads((other_passport.path / "passport.json").read_text())
    assert stated["verdict"] == passport.metrics["verdict"] == "passed"
    assert 0 < stated["worst_difference"] <= stated["tolerance"]
    assert stated["digests"]["model"] == chain.model.digest
    program = digest_file(chain.program.path / "model.onnx")
    assert stated["digests"]["served_files"][NAME]["model.onnx"] == program
    assert stated["seeds"]["fresh"] != other["seeds"]["fresh"]


def test_passport_covers_sizes_lengths_and_paddings(passport: Artifact) -> None:
    rows = json.loads((passport.path / "passport.json").read_text())["rows"]
    lengths = [*PASSPORT.verify.lengths, PASSPORT.sequence_length]
    expected = {
        (transport, size, length, padding)
        for transport in ("http", "grpc", "shared memory")
        for size in range(1, EXPORT.max_batch_size + 1)
        for length, paddings in [
            *((length, ("none", "left", "right")) for length in lengths[:-1]),
            (lengths[-1], ("none",)),
            ("mixed", ("left", "right")),
        ]
        for padding in paddings
    }
    found = [row["details"] for row in rows if row["name"] == "scores"]
    assert {(row["transport"], row["batch_size"], row["length"], row["padding"]) for row in found} == expected
    names = {row["name"] for row in rows}
    assert names >= {"config", "loaded files", "special tokens", "refusals", "given text", "embeddings"}
    assert {row["details"]["pooling"] for row in rows if row["name"] == "embeddings"} == {"mean"}
    assert all(0 < row["tolerance"] < 1e-3 for row in rows if row["name"] in ("given text", "embeddings"))
    batches = [row["details"]["batches_by_size"] for row in rows if row["name"] == "concurrent"]
    assert [max(map(int, formed)) > 1 for formed in batches] == [True] * 3


def test_server_leaves_nothing_in_the_artifact(passport: Artifact) -> None:
    files = {str(path.relative_to(passport.path)) for path in passport.path.rglob("*") if path.is_file()}
    assert files == {"passport.json", "logs/server.log"}


def test_other_tokenizer_is_caught(chain: Chain, tmp_path: Path) -> None:
    program = shutil.copytree(chain.program.path, tmp_path / "program")
    tiny_model.make_tokenizer(program, seed=1)
    changed = tiny_model.artifact("program", program)
    planted = replace(
        chain, program=changed, entry=build_entry(tmp_path / "entry", {**chain.made_from, "program": changed})
    )
    (tmp_path / "passport").mkdir()
    with pytest.raises(verify_stage.PassportError, match="tokenizer") as caught:
        verify_stage.build(tmp_path / "passport", PASSPORT, planted.passport_parents)
    assert "Nothing was published" in str(caught.value)
    assert f"{NAME}_text/1/tokenizer.json is not what was exported" in str(caught.value)
    stated = json.loads((tmp_path / "passport" / "passport.json").read_text())
    assert stated["verdict"] == "failed"
    rows = stated["rows"]
    (behaviour,) = [row for row in rows if row["name"] == "tokenizer"]
    assert not behaviour["passed"], "digests alone saw it"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (f"{NAME}_text/1/tokenizer.json", "tokenizer.json has sha256"),
        (f"{NAME}/configs/embedded.pbtxt", "config"),
    ],
)
def test_damaged_file_is_refused_by_the_server(chain: Chain, tmp_path: Path, file: str, expected: str) -> None:
    shutil.copytree(chain.entry.path, tmp_path / "entry")
    path = tmp_path / "entry" / "repo" / file
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    planted = replace(chain, entry=replace(chain.entry, path=tmp_path / "entry"))
    (tmp_path / "passport").mkdir()
    with pytest.raises(verify_stage.PassportError, match="cannot be served, so nothing was published") as caught:
        verify_stage.build(tmp_path / "passport", PASSPORT, planted.passport_parents)
    assert expected in str(caught.value)
