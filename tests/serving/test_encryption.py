"""Weights at rest are encrypted, and only who has the key can serve them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from flows.config import Config, ConfigError
from flows.config.serving import ExportConfig
from flows.export.shipped import encryption
from flows.preflight import check
from flows.serving import config_pbtxt, entry
from flows.serving.proof import verify_stage
from tests.serving.tiny_chain import ENTRY, EXPORT, NAME, PASSPORT, Chain, build_entry

KEY = "0f" * 32
OTHER = "f0" * 32


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(encryption.KEY_PATH, raising=False)
    monkeypatch.setenv(encryption.KEY, KEY)
    return KEY


def test_a_file_comes_back_and_only_with_its_key(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"a": b"weights" * 1000, "b": b"weights" * 1000}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    encrypted = {name: encryption.encrypt(tmp_path / name) for name in contents}
    assert not (tmp_path / "a").exists()
    assert b"weights" not in encrypted["a"].read_bytes()
    assert encrypted["a"].read_bytes() != encrypted["b"].read_bytes()
    assert encryption.decrypt(encrypted["a"]) == contents["a"]
    before = encrypted["a"].read_bytes()
    (tmp_path / "a").write_bytes(contents["a"])
    assert encryption.encrypt(tmp_path / "a").read_bytes() == before, "equal content gives equal bytes"
    encrypted["b"].write_bytes(before)  # in another file's place
    encrypted["a"].write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    for path in encrypted.values():
        with pytest.raises(RuntimeError, match="cannot be decrypted: it was changed, or the key is another one"):
            encryption.decrypt(path)
    encrypted["a"].write_bytes(before)
    monkeypatch.setenv(encryption.KEY, OTHER)
    with pytest.raises(RuntimeError, match="the key is another one"):
        encryption.decrypt(encrypted["a"])


def test_keys_are_read_with_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(encryption.KEY, raising=False)
    monkeypatch.delenv(encryption.KEY_PATH, raising=False)
    with pytest.raises(RuntimeError, match="neither MILLRACE_WEIGHTS_KEY nor MILLRACE_WEIGHTS_KEY_PATH is set"):
        encryption.read_key()
    with pytest.raises(ConfigError, match=r"export.encrypt_weights=True needs a key: .*neither"):
        check(Config(export=ExportConfig(encrypt_weights=True)))
    path = tmp_path / "key"
    monkeypatch.setenv(encryption.KEY_PATH, str(path))
    with pytest.raises(RuntimeError, match="does not exist"):
        encryption.read_key()
    path.write_text(f"{KEY}\n")
    path.chmod(0o640)
    with pytest.raises(RuntimeError, match=r"has mode 640: others may read it. chmod 600"):
        encryption.read_key()
    path.chmod(0o600)
    assert encryption.read_key() == bytes.fromhex(KEY)
    path.write_text(KEY[:-2])
    with pytest.raises(RuntimeError, match=r"must be 64 hexadecimal digits. Make one with"):
        encryption.read_key()


@pytest.mark.server
def test_an_encrypted_version_is_proven_like_any_other(
    key: str, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = replace(EXPORT, encrypt_weights=True)
    config = replace(ENTRY, export=export)
    made = replace(chain, entry=build_entry(tmp_path / "entry", chain.made_from, config))
    repository = tmp_path / "entry" / "repo"
    assert not list(repository.rglob("*.onnx"))
    weights = max(onnx.load(chain.program.path / "model.onnx").graph.initializer, key=lambda one: len(one.raw_data))
    files = [path.read_bytes() for path in repository.rglob("*") if path.is_file()]
    assert not any(weights.raw_data[:64] in content for content in files)
    production = config_pbtxt.parse((repository / NAME / "config.pbtxt").read_text())
    assert production.backend == "python", "the ONNX backend cannot decrypt"
    (tmp_path / "passport").mkdir()
    summary = verify_stage.build(tmp_path / "passport", replace(PASSPORT, export=export), made.passport_parents)
    assert summary["verdict"] == "passed"
    assert np.isfinite(summary["worst_difference"])
    stated = json.loads((tmp_path / "passport" / "passport.json").read_text())
    assert "model.onnx.aesgcm" in stated["digests"]["served_files"][NAME]
    before = entry.fingerprint(config)
    monkeypatch.setenv(encryption.KEY, OTHER)
    assert entry.fingerprint(config) != before, "another key is another entry"
    (tmp_path / "again").mkdir()
    with pytest.raises(
        verify_stage.PassportError, match=r"cannot be decrypted: it was changed, or the key is another one"
    ):
        verify_stage.build(tmp_path / "again", replace(PASSPORT, export=export), made.passport_parents)
