"""The cache as a stage and in training: the dense run within its bound, on any ranks, whole or refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.config import ConfigError, RunError
from flows.config.distillation import CacheRun
from flows.config.engine import EngineConfig
from flows.config.training import Objective, TrainingRun
from flows.data.mixture import Mixture, open_split
from flows.data.packed import PackedDataset
from flows.data.tokenizer import copy_tokenizer
from flows.model.checkpoint import load_decoder, save_decoder
from flows.model.decoder import Decoder, initialize
from flows.training import teacher_cache
from flows.training.cache_records import pack_records
from flows.training.teacher_cache import TeacherCache, first_visits
from tests.training.conftest import SEQUENCE_LENGTH, TINY, VOCAB_SIZE

CACHE = CacheRun(top_k=40, sequences=12 * 8, sequence_length=SEQUENCE_LENGTH, seed=0)


@pytest.fixture
def teacher(tmp_path: Path, data: Mapping[str, Artifact]) -> Artifact:
    """A decoder that expects something, as a candidate."""
    model = Decoder(replace(TINY, initializer_range=0.5), VOCAB_SIZE).requires_grad_(False)
    initialize(model, seed=5)
    save_decoder(tmp_path / "teacher", model.state_dict(), TINY, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
    copy_tokenizer(data["tokenizer"].path, tmp_path / "teacher")
    return Artifact("teacher", "teacher", "teacher", tmp_path / "teacher")


@pytest.fixture
def cached(tmp_path: Path, data: dict[str, Artifact], teacher: Artifact) -> Callable[..., Artifact]:
    """Makes a cache."""

    def make(config: CacheRun = CACHE, store: str = "store", **parents: Artifact) -> Artifact:
        stage = Stage("teacher_cache", "flows.training.teacher_cache", config, {**data, "teacher": teacher, **parents})
        return ArtifactStore(tmp_path / store).make(stage)

    return make


@pytest.mark.parametrize("document_masks", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_it_holds_what_the_teacher_expects_at_each_token(
    data: dict[str, Artifact], teacher: Artifact, cached: Callable[..., Artifact], document_masks: bool
) -> None:
    cache = cached(replace(CACHE, document_masks=document_masks))
    dataset = open_split(data["tokens"].path, "train", SEQUENCE_LENGTH, document_masks)
    reader = TeacherCache(cache.path)
    numbers = dataset.order(10, 5, 0)
    records = reader.records(numbers)
    assert records.shape == (5, SEQUENCE_LENGTH, reader.layout.record_bytes)
    model = load_decoder(teacher.path)
    for number, record in zip(numbers, records, strict=True):
        row = dataset.row(int(number))
        ids, documents = (torch.from_numpy(part)[None] for part in (row.input_ids_L, row.document_ids_L))
        expected = pack_records(reader.layout, model(ids, document_ids_BL=documents)[0].detach())
        ours, theirs = (one[:, reader.layout.id_bytes :].contiguous().view(torch.float16) for one in (record, expected))
        # sums of other batches are rounded otherwise, in float32, and then to float16
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-9, atol=1e-4)
    assert cache.metrics["rows"] == 96
    assert cache.metrics["bytes"] == sum(path.stat().st_size for path in cache.path.glob("rows-*.bin"))
    assert cache.metrics["bytes"] == cache.metrics["plan"]["bytes"]
    assert 0 < cache.metrics["tail_mass"] < 0.2


def test_of_a_mixture_each_sequence_is_there_once_in_the_order_of_first_visits(data: dict[str, Artifact]) -> None:
    corpora = {
        "large": PackedDataset(data["tokens"].path, "train", SEQUENCE_LENGTH),
        "small": PackedDataset(data["tokens"].path, "validation", SEQUENCE_LENGTH),
    }
    mixture = Mixture(corpora, {"large": 1, "small": 1})
    visits = first_visits(mixture, replace(CACHE, sequences=400))
    assert len(visits) == 200 + len(corpora["small"]) == len(set(visits.tolist()))
    seen: list[int] = []
    for number in mixture.order(0, 400, 0).tolist():
        if number not in seen:
            seen.append(number)
    assert visits.tolist() == seen


def test_an_interrupted_one_goes_on_and_has_the_same_digest(
    cached: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row_bytes = SEQUENCE_LENGTH * 118
    monkeypatch.setattr(teacher_cache, "ROWS_AT_ONCE_TOKENS", 8 * SEQUENCE_LENGTH)
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 40 * row_bytes)
    whole = cached()
    index = json.loads((whole.path / "index.json").read_text())
    assert [shard["rows"] for shard in index["shards"]] == [40, 40, 16]
    assert TeacherCache(whole.path).layout.record_bytes == 118
    write, done = teacher_cache._write_shard, []

    def interrupted(path: Path, *rest: object) -> None:
        if len(done) == 1:
            (path.parent / f".{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(path)
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher_cache, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(store="again")
    first = next((tmp_path / "again").glob("*.partial/rows-00000.bin"))
    inode = first.stat().st_ino
    monkeypatch.setattr(teacher_cache, "_write_shard", write)
    again = cached(store="again")
    assert again.digest == whole.digest
    assert (again.path / "rows-00000.bin").stat().st_ino == inode


def test_what_cannot_be_kept_is_refused_before_work(
    cached: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, teacher: Artifact
) -> None:
    with pytest.raises(ConfigError, match=r"distill.cache.top_k=64 must be less than the 64 tokens .* Set .*=16"):
        cached(replace(CACHE, top_k=64))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 50_000))
    with pytest.raises(ConfigError, match=r"makes a cache of 0 MB, and 0 MB are free .* Set distill.cache.top_k="):
        cached()
    monkeypatch.undo()
    (teacher.path / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(RunError, match=r"has another tokenizer than this run: .* set data.tokenizer.directory"):
        cached()


def taught(run: TrainingRun, top_k: int) -> TrainingRun:
    return replace(run, objective=Objective.distillation, alpha=0.7, temperature=2.0, cache_top_k=top_k)


def test_a_student_of_the_cache_learns_as_one_of_the_teacher_on_one_rank_and_two(
    trained: Callable[..., Artifact],
    tiny_run: Callable[..., TrainingRun],
    losses: Callable[[Artifact], list[float]],
    cached: Callable[..., Artifact],
    teacher: Artifact,
) -> None:
    cache = cached(replace(CACHE, top_k=63))
    dense = losses(trained(taught(tiny_run(), 0), teacher=teacher))
    alone = trained(taught(tiny_run(), 63), teacher=teacher, cache=cache)
    # all but one token are kept: nothing but the rounding of log-probabilities, each by 1/2048 of itself at most
    assert losses(alone) == pytest.approx(dense, rel=2e-3)
    assert losses(alone) != dense
    run = taught(tiny_run(ranks=2, engine=EngineConfig(zero_stage=2)), 63)
    shared = trained(run, store="shared", teacher=teacher, cache=cache)
    assert losses(shared) == pytest.approx(losses(alone), abs=3e-6)  # the bound of the parity tests
    assert alone.metrics["plan"]["teacher_parameters"] == 0
    assert "teacher" not in alone.metrics["plan"]["memory"]


def test_a_cache_of_other_weights_or_data_is_refused(
    trained: Callable[..., Artifact],
    tiny_run: Callable[..., TrainingRun],
    cached: Callable[..., Artifact],
    data: dict[str, Artifact],
    teacher: Artifact,
    tmp_path: Path,
) -> None:
    cache = cached()
    run = taught(tiny_run(), 40)
    with pytest.raises(RunError, match="tokens_digest=tokens, and this run other: it is of another teacher or other"):
        trained(run, teacher=teacher, cache=cache, tokens=replace(data["tokens"], digest="other"))
    shutil.copytree(teacher.path, tmp_path / "other")
    model = load_decoder(teacher.path).requires_grad_(False)
    model.model.norm.weight.add_(1)
    save_decoder(tmp_path / "other", model.state_dict(), TINY, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
    with pytest.raises(RunError, match="weights_digest="):
        trained(run, teacher=replace(teacher, path=tmp_path / "other"), cache=cache)
    with pytest.raises(RunError, match=r"lacks sequence \d+: it is of a shorter run"):
        TeacherCache(cache.path).records(np.arange(400))


def test_without_weight_the_teacher_is_not_even_loaded(
    trained: Callable[..., Artifact],
    tiny_run: Callable[..., TrainingRun],
    losses: Callable[[Artifact], list[float]],
    teacher: Artifact,
    tmp_path: Path,
) -> None:
    run = replace(tiny_run(max_steps=2), objective=Objective.distillation, alpha=0.0)
    plain = losses(trained(replace(run, objective=Objective.cross_entropy)))
    copy = tmp_path / "copy"
    shutil.copytree(teacher.path, copy)
    (copy / "model.safetensors").write_bytes(b"nothing")
    assert losses(trained(run, teacher=replace(teacher, path=copy))) == plain
