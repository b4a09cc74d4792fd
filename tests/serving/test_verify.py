from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from flows.artifact import Artifact, digest_file
from flows.serving import verify
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
        for transport in ("http", "grpc")
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
    batches = [row["details"]["batches_by_size"] for row in rows if row["name"] == "concurrent"]
    assert [max(map(int, formed)) > 1 for formed in batches] == [True, True]


def test_server_leaves_nothing_in_the_artifact(passport: Artifact) -> None:
    files = {str(path.relative_to(passport.path)) for path in passport.path.rglob("*") if path.is_file()}
    assert files == {"passport.json", "logs/server.log"}


def flip_a_weight(chain: Chain, root: Path) -> Chain:
    def edit(graph: onnx.GraphProto) -> None:
        weight = max(graph.initializer, key=lambda tensor: len(tensor.raw_data))
        changed = bytearray(weight.raw_data)
        changed[4 * 1000 + 2] ^= 0x40  # the mantissa's highest bits of weight 1000
        weight.raw_data = bytes(changed)

    return with_program(chain, root, edit)


def change_rms_norm_eps(chain: Chain, root: Path) -> Chain:
    def edit(graph: onnx.GraphProto) -> None:
        constants = [node.attribute[0].t for node in graph.node if node.op_type == "Constant"]
        found = 0
        for tensor in (*graph.initializer, *(one for one in constants if one.data_type)):
            value = onnx.numpy_helper.to_array(tensor)
            if value.size == 1 and value.dtype == np.float32 and np.isclose(value, tiny_model.MODEL.rms_norm_eps).all():
                tensor.CopyFrom(onnx.numpy_helper.from_array(value * np.float32(10), tensor.name))
                found += 1
        assert found > 0

    return with_program(chain, root, edit)


def with_program(chain: Chain, root: Path, edit: Callable[[onnx.GraphProto], None]) -> Chain:
    """The chain with another program, everything behind it made anew: only parity can tell."""
    program = shutil.copytree(chain.program.path, root / "program")
    model = onnx.load(program / "model.onnx")
    edit(model.graph)
    onnx.save(model, program / "model.onnx")
    changed = tiny_model.artifact("program", program)
    return replace(chain, program=changed, entry=build_entry(root / "entry", {**chain.made_from, "program": changed}))


def ignore_padding(chain: Chain, root: Path) -> Chain:
    return with_served_source(chain, root, '"attention_mask": mask_BL}', '"attention_mask": np.ones_like(mask_BL)}')


def swap_padding_side(chain: Chain, root: Path) -> Chain:
    return with_served_source(chain, root, "logits_BV = ", "ids_BL = ids_BL[:, ::-1]; logits_BV = ")


def with_served_source(chain: Chain, root: Path, before: str, after: str) -> Chain:
    """The chain with another model.py in its entry, its digests made anew."""
    shutil.copytree(chain.entry.path, root / "entry")
    version = root / "entry" / "repo" / NAME / "1"
    source = (version / "model.py").read_text()
    assert before in source
    (version / "model.py").write_text(source.replace(before, after))
    listed = json.loads((version / "files.json").read_text())
    (version / "files.json").write_text(json.dumps(listed | {"model.py": digest_file(version / "model.py")}))
    return replace(chain, entry=tiny_model.artifact("entry", root / "entry"))


@pytest.mark.parametrize("plant", [flip_a_weight, change_rms_norm_eps, swap_padding_side])
def test_wrong_scores_are_caught(chain: Chain, tmp_path: Path, plant: Callable[[Chain, Path], Chain]) -> None:
    (tmp_path / "passport").mkdir()
    with pytest.raises(verify.PassportError, match=r"Nothing was published") as caught:
        verify.build(tmp_path / "passport", PASSPORT, plant(chain, tmp_path).passport_parents)
    assert "scores (transport http" in str(caught.value)
    assert "tolerance" in str(caught.value)
    stated = json.loads((tmp_path / "passport" / "passport.json").read_text())
    assert stated["verdict"] == "failed"
    assert stated["worst_difference"] > stated["tolerance"]


def test_padding_fault_is_seen_in_padded_requests_only(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "passport").mkdir()
    with pytest.raises(verify.PassportError):
        verify.build(tmp_path / "passport", PASSPORT, ignore_padding(chain, tmp_path).passport_parents)
    rows = json.loads((tmp_path / "passport" / "passport.json").read_text())["rows"]
    scores = [row for row in rows if row["name"] == "scores"]
    assert all(row["passed"] for row in scores if row["details"]["padding"] == "none")
    padded = [row for row in scores if row["details"]["padding"] == "right" and row["details"]["length"] != "mixed"]
    assert padded
    assert not any(row["passed"] for row in padded)


def test_other_tokenizer_is_caught(chain: Chain, tmp_path: Path) -> None:
    program = shutil.copytree(chain.program.path, tmp_path / "program")
    tiny_model.make_tokenizer(program, seed=1)
    changed = tiny_model.artifact("program", program)
    planted = replace(
        chain, program=changed, entry=build_entry(tmp_path / "entry", {**chain.made_from, "program": changed})
    )
    (tmp_path / "passport").mkdir()
    with pytest.raises(verify.PassportError, match="tokenizer") as caught:
        verify.build(tmp_path / "passport", PASSPORT, planted.passport_parents)
    assert f"{NAME}_text/1/tokenizer.json is not what was exported" in str(caught.value)
    rows = json.loads((tmp_path / "passport" / "passport.json").read_text())["rows"]
    (behaviour,) = [row for row in rows if row["name"] == "tokenizer"]
    assert not behaviour["passed"], "digests alone saw it"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (f"{NAME}/1/model.onnx", "model.onnx has sha256"),
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
    with pytest.raises(verify.PassportError, match="cannot be served, so nothing was published") as caught:
        verify.build(tmp_path / "passport", PASSPORT, planted.passport_parents)
    assert expected in str(caught.value)
