from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.config import ConfigError
from flows.config.data import CorpusConfig, Format, Source
from flows.data import splits
from flows.data.splits import SPLITS, SplitWriter, read_documents_of, split_by_name


def make(root: Path, config: CorpusConfig) -> Artifact:
    return ArtifactStore(root / "artifacts").make(Stage("corpus", "flows.data.corpus", config))


def documents_of(directory: Path) -> dict[str, dict[str, str]]:
    return {split: dict(read_documents_of(directory, split)) for split in SPLITS}


def whole(path: Path, **options: Any) -> CorpusConfig:
    return CorpusConfig(source=Source.files, paths=(str(path),), validation_fraction=0, test_fraction=0, **options)


def test_every_dropped_document_is_counted_and_named(tmp_path: Path, write_files: Callable[..., Path]) -> None:
    root = write_files(
        {
            "a.txt": "the same text\r\n",
            "b.txt": "the same text\n",
            "c.txt": "the same \x07text\n",
            "binary.bin": b"\x7fELF\0\0",
            "empty.txt": "",
            "blank.txt": " \n",
            "latin.txt": b"na\xefve and long enough",
            "short.txt": "tiny",
            "lines.jsonl": '{"text": "a good line"}\n{"text": "cut\n{"body": "another field"}\n\n',
        }
    )
    metrics = make(tmp_path, whole(root, min_document_bytes=8)).metrics
    assert metrics["read"]["documents"] == 12
    assert metrics["splits"]["train"] == {"documents": 2, "bytes": len("the same text\n" + "a good line")}
    assert metrics["dropped"] == {
        "duplicate": {"documents": 2, "first": ["b.txt", "c.txt"]},
        "empty": {"documents": 3, "first": ["blank.txt", "empty.txt", "lines.jsonl#4"]},
        "too short": {"documents": 1, "first": ["short.txt"]},
        "binary": {"documents": 1, "first": ["binary.bin"]},
        "bad UTF-8": {"documents": 1, "first": ["latin.txt"]},
        "broken json line": {"documents": 1, "first": ["lines.jsonl#2"]},
        "missing field": {"documents": 1, "first": ["lines.jsonl#3"]},
        "not a conversation": {"documents": 0, "first": []},
        "no answer by the assistant": {"documents": 0, "first": []},
        "missing label": {"documents": 0, "first": []},
        "unknown label": {"documents": 0, "first": []},
    }


def test_bytes_read_are_those_of_the_files(tmp_path: Path, write_files: Callable[..., Path]) -> None:
    root = write_files({"a.txt": "caf\u00e9", "b.txt": b"\xff\xfe", "c.bin": b"\0\0\0"})
    assert make(tmp_path, whole(root)).metrics["read"] == {"documents": 3, "bytes": 5 + 2 + 3}


def test_only_the_first_names_of_a_reason_are_kept(tmp_path: Path, write_json_lines: Callable[..., Path]) -> None:
    path = write_json_lines([{"text": "same"}] * 100)
    duplicates = make(tmp_path, whole(path)).metrics["dropped"]["duplicate"]
    assert duplicates == {"documents": 99, "first": [f"raw.jsonl#{line}" for line in range(2, 7)]}


def test_what_is_left_out_is_said_while_it_happens(
    tmp_path: Path, write_json_lines: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, whole(write_json_lines([{"text": "same"}] * 100 + [{"txet": "other"}])))
    assert caplog.messages == ["100 of 101 documents are left out: 99 duplicate, 1 missing field"]


def test_conversations_without_their_field_are_told_its_name(
    tmp_path: Path, write_json_lines: Callable[..., Path]
) -> None:
    config = whole(write_json_lines([{"text": "a"}]), format=Format.messages)
    with pytest.raises(ConfigError, match=r"1 read \(1 missing field\)\. .* data.corpus.messages_field=messages"):
        make(tmp_path, config)


def test_nothing_usable_is_an_error_that_counts(tmp_path: Path, write_files: Callable[..., Path]) -> None:
    root = write_files({"a.bin": b"\0", "b.bin": b"\0\0", "c.txt": ""})
    with pytest.raises(ConfigError, match=r"source=files gives no usable document: 3 read \(2 binary, 1 empty\)\. "):
        make(tmp_path, whole(root))
    assert not list((tmp_path / "artifacts").glob("corpus-*[0-9a-f]/manifest.json"))


def test_an_empty_source_is_an_error(tmp_path: Path, write_json_lines: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"no usable document: 0 read \(nothing there\)"):
        make(tmp_path, whole(write_json_lines([])))


def test_fewer_documents_than_splits_is_an_error(tmp_path: Path, write_json_lines: Callable[..., Path]) -> None:
    path = write_json_lines([{"text": "one"}, {"text": "two"}])
    config = CorpusConfig(source=Source.files, paths=(str(path),))
    with pytest.raises(ConfigError, match=r"validation_fraction=0.03 with test_fraction=0.03 needs at least 3 usable"):
        make(tmp_path, config)


def test_the_same_text_gives_the_same_bytes_wherever_it_lies(
    tmp_path: Path, write_files: Callable[..., Path], email_config: CorpusConfig
) -> None:
    first = make(tmp_path, email_config)
    source = Path(email_config.paths[0].split("/**")[0])
    copy = tmp_path / "elsewhere" / "deeper"
    for path in sorted(source.rglob("*.py"), reverse=True):
        target = copy / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    second = make(
        tmp_path / "again",
        CorpusConfig(source=Source.files, paths=(str(copy),), validation_fraction=0.1, test_fraction=0.1),
    )
    assert first.key != second.key
    assert first.digest == second.digest
    (copy / "message.py").write_text("another text")
    changed = make(
        tmp_path / "again",
        CorpusConfig(source=Source.files, paths=(str(copy),), validation_fraction=0.1, test_fraction=0.1),
    )
    assert changed.digest != first.digest, "the fingerprint saw the change and the content followed"


def test_documents_go_where_the_hash_of_their_name_says(tmp_path: Path, write_json_lines: Callable[..., Path]) -> None:
    path = write_json_lines([{"text": f"document {number}"} for number in range(2000)])
    config = CorpusConfig(source=Source.files, paths=(str(path),), validation_fraction=0.1, test_fraction=0.2)
    found = documents_of(make(tmp_path, config).path)
    for split in SPLITS:
        assert {split_by_name(name, config) for name in found[split]} == {split}
    # Five standard deviations of a binomial count: 5 * sqrt(2000 * p * (1 - p)).
    assert abs(len(found["validation"]) - 200) < 68
    assert abs(len(found["test"]) - 400) < 90
    assert sum(len(split) for split in found.values()) == 2000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    names=st.lists(st.text(alphabet="abcdef", min_size=1, max_size=6), min_size=3, max_size=9, unique=True),
    validation=st.sampled_from([0.0, 0.01, 0.3, 0.49]),
    test=st.sampled_from([0.0, 0.01, 0.3, 0.49]),
)
def test_no_wanted_split_stays_empty(tmp_path: Path, names: list[str], validation: float, test: float) -> None:
    config = CorpusConfig(validation_fraction=validation, test_fraction=test)
    writer = SplitWriter(tmp_path, config)
    for name in names:
        writer.write(name, f"text of {name}")
    writer.finish()
    found = documents_of(tmp_path)
    assert {name: text for split in found.values() for name, text in split.items()} == {
        name: f"text of {name}" for name in names
    }
    wanted = {"train"} | ({"validation"} if validation else set()) | ({"test"} if test else set())
    assert {split for split in SPLITS if found[split]} == wanted
    assert {split: size["documents"] for split, size in writer.sizes.items()} == {
        split: len(found[split]) for split in SPLITS
    }


def test_row_groups_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_json_lines: Callable[..., Path]
) -> None:
    monkeypatch.setattr(splits, "ROW_GROUP_BYTES", 100)
    texts = [f"{number:050d}" for number in range(9)]
    corpus = make(tmp_path, whole(write_json_lines([{"text": text} for text in texts])))
    with pq.ParquetFile(corpus.path / "train.parquet") as file:
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 2, 2, 2, 1]
    # The one held back, so that no split stays empty, comes last.
    assert [text for _, text in read_documents_of(corpus.path, "train")] == texts[1:] + texts[:1]
    assert json.loads((corpus.path / "manifest.json").read_text())["metrics"]["splits"]["train"]["bytes"] == 450
