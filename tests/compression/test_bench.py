"""The benchmark against torchao runs, and says what it needs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.compression import bench
from flows.config import RunError


@pytest.mark.exhaustive
def test_it_prints_every_way_and_the_ratios_that_have_a_rival(
    tmp_path: Path, source: Artifact, tokens: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((source.path / "config.json").read_text()) | {"max_position_embeddings": 32}
    (source.path / "config.json").write_text(json.dumps(config))
    index = json.loads((tokens.path / "index.json").read_text())
    index["splits"]["test"] = index["splits"]["train"]
    (tokens.path / "index.json").write_text(json.dumps(index))
    chosen = {name: way for name, way in bench.OURS.items() if not name.startswith("w4a16")}
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(RunError, match=r"torchao cannot be imported: .* Run `pip install torchao==0.18.0`"):
            bench.torchao_rivals()
        rivals = {}
    else:
        rivals = bench.torchao_rivals()
    bench.compare(source.path, tokens.path, 4, {name: rivals[name] for name in chosen if name in rivals}, chosen)
    printed = capsys.readouterr().out
    assert "14 layers, 4 sequences of 32 tokens" in printed
    for name in chosen:
        assert re.search(rf"{name} +\d+\.\d+ s +\d+\.\d\d dB loss \d+\.\d+", printed)
    assert printed.count("x as fast") == len(rivals and chosen)
