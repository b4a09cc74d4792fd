"""The stage: a pruned candidate is a model directory like any other."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.artifact import Artifact
from flows.compression import prune
from flows.compression.candidate import count_parameters, load_candidate
from flows.config.prune import PruneConfig, PruningConfig
from flows.model.config_json import read_config
from flows.model.decoder import Decoder

IDS = torch.arange(40).view(2, 20)


def built(directory: Path, source: Artifact, tokens: Artifact, **settings: Any) -> dict[str, Any]:
    directory.mkdir()
    config = PruningConfig(prune=PruneConfig(**settings), sequence_length=32)
    return dict(prune.build(directory, config, {"model": source, "tokens": tokens}))


def test_a_smaller_model_is_really_smaller(tmp_path: Path, source: Artifact, tokens: Artifact, model: Decoder) -> None:
    settings = {"intermediate_size": 60, "num_key_value_heads": 1, "hidden_size": 40, "num_hidden_layers": 1}
    metrics = built(tmp_path / "pruned", source, tokens, **settings)
    loaded = load_candidate(tmp_path / "pruned")
    shape, vocab_size = read_config(tmp_path / "pruned")
    assert vocab_size == 300
    assert {name: getattr(shape, name) for name in settings} == settings
    assert (shape.num_attention_heads, shape.head_dim) == (2, 16)
    assert count_parameters(loaded) == metrics["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert metrics["source_parameters"] == sum(p.numel() for p in model.parameters())
    weights, whole = (path / "model.safetensors" for path in (tmp_path / "pruned", source.path))
    assert weights.stat().st_size < 0.6 * whole.stat().st_size
    assert metrics["shape"]["hidden_size"] == (64, 40)
    assert (tmp_path / "pruned" / "tokenizer.json").read_text() == '{"any": "tokenizer"}'
    chosen = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert len(chosen["sequences"]) == 40
    assert [len(numbers) for numbers in chosen["kept"]["neurons"]] == [60]
    json.dumps(metrics)


def test_transformers_computes_the_same(tmp_path: Path, source: Artifact, tokens: Artifact) -> None:
    transformers = pytest.importorskip("transformers")
    built(tmp_path / "pruned", source, tokens, num_key_value_heads=1, hidden_size=40, layers=(1,))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, load_candidate(tmp_path / "pruned")(IDS), rtol=1e-4, atol=1e-5)


def test_what_is_kept_as_it_is_computes_the_same(tmp_path: Path, source: Artifact, tokens: Artifact) -> None:
    metrics = built(tmp_path / "pruned", source, tokens, layers=(0, 1))
    assert torch.equal(load_candidate(tmp_path / "pruned")(IDS), load_candidate(source.path)(IDS))
    assert metrics["loss"] == metrics["source_loss"]


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_sparse_model_keeps_its_shape_and_reports_every_matrix(
    tmp_path: Path, source: Artifact, tokens: Artifact, pattern: str | None
) -> None:
    metrics = built(tmp_path / "pruned", source, tokens, sparsity=0.5, method="wanda", pattern=pattern)
    assert metrics["parameters"] == metrics["source_parameters"]
    assert read_config(tmp_path / "pruned") == read_config(source.path)
    assert [row["sparsity"] for row in metrics["layers"] if row["skipped_reason"] is None] == [0.5] * 14
    assert {row["name"] for row in metrics["layers"] if row["skipped_reason"]} == {"model.embed_tokens", "lm_head"}
    assert (
        len({json.dumps(asdict(row)) if not isinstance(row, dict) else row["name"] for row in metrics["layers"]}) == 16
    )


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, source: Artifact, tokens: Artifact) -> None:
    for name in ("first", "second"):
        built(tmp_path / name, source, tokens, intermediate_size=88, hidden_size=32)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["config.json", "model.safetensors", "pruning.json", "tokenizer.json"]
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in names)
