"""The proof of a version whose keys and values are kept in 8 bits, through a real server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows.config import ConfigError
from flows.config.serving import CacheDtype, ExportConfig
from flows.serving.proof import verify_stage
from tests.serving import tiny_model
from tests.serving.tiny_chain import ENTRY, EXPORT, PASSPORT, Chain, build_entry


@pytest.mark.exhaustive
@pytest.mark.server
@pytest.mark.parametrize("cache_dtype", [CacheDtype.int8, CacheDtype.fp8])
def test_texts_of_a_version_with_a_cache_in_8_bits_are_those_of_its_checkpoint(
    chain: Chain, tmp_path: Path, cache_dtype: CacheDtype
) -> None:
    coded = replace(EXPORT, cache_dtype=cache_dtype)
    directory = tiny_model.make_generation(tmp_path / "generation", chain.model.path, cache_dtype)
    made_from = {**chain.made_from, "generation": tiny_model.artifact("generation", directory)}
    entry = build_entry(tmp_path / "entry", made_from, replace(ENTRY, export=coded))
    with pytest.raises(ConfigError, match=r"export.cache_mb=0 .* one text of 32 tokens x 96 bytes"):
        build_entry(tmp_path / "tight", made_from, replace(ENTRY, export=_with_no_cache(coded)))
    (tmp_path / "passport").mkdir()
    parents = replace(chain, entry=entry).passport_parents
    verify_stage.build(tmp_path / "passport", replace(PASSPORT, export=coded), parents)
    passport = json.loads((tmp_path / "passport" / verify_stage.PASSPORT).read_text())
    assert passport["verdict"] == "passed"
    texts = [row for row in passport["rows"] if row["name"] == "greedy text"]
    assert texts
    assert all(row["tolerance"] != passport["tolerance"] for row in texts), "measured without the cache"


def _with_no_cache(coded: ExportConfig) -> ExportConfig:
    export = replace(coded)
    object.__setattr__(export, "cache_mb", 0)  # the smallest that the rules allow holds this tiny model's texts
    return export
