from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.config import ConfigError
from flows.config.data import CorpusConfig, Source
from flows.data import sources
from flows.data.cleaning import Dropped
from flows.data.sources import check_sources, fingerprint, read_documents

WriteFiles = Callable[..., Path]


def files(*paths: object, **options: Any) -> CorpusConfig:
    return CorpusConfig(source=Source.files, paths=tuple(str(path) for path in paths), **options)


def huggingface(dataset: object, **options: Any) -> CorpusConfig:
    return CorpusConfig(source=Source.huggingface, dataset=str(dataset), **options)


def contents(config: CorpusConfig) -> dict[str, Any]:
    check_sources(config)
    return {document.name: document.content for document in read_documents(config)}


def test_standard_library_without_installed_packages() -> None:
    found = contents(CorpusConfig())
    root = Path(sysconfig.get_path("stdlib"))
    assert found["json/decoder.py"] == (root / "json/decoder.py").read_bytes()
    assert len(found) > 500
    assert all(name.endswith(".py") and "-packages/" not in name for name in found)
    assert list(found) == sorted(found)


def test_max_documents_takes_the_first() -> None:
    assert list(contents(CorpusConfig(max_documents=3))) == list(contents(CorpusConfig()))[:3]


def test_directory_file_and_glob(write_files: WriteFiles) -> None:
    root = write_files({"b/two.txt": "2", "a.md": "1", "b/c/three.txt": "3", ".hidden/x.txt": "no", "d[1].txt": "4"})
    assert contents(files(root)) == {"a.md": b"1", "b/c/three.txt": b"3", "b/two.txt": b"2", "d[1].txt": b"4"}
    assert contents(files(root / "a.md")) == {"a.md": b"1"}
    assert contents(files(f"{root}/**/*.txt")) == {"b/c/three.txt": b"3", "b/two.txt": b"2", "d[1].txt": b"4"}
    assert contents(files(f"{root}/b/*.txt")) == {"two.txt": b"2"}
    assert contents(files(root / "d[1].txt")) == {"d[1].txt": b"4"}, "a file that exists is not a glob"


def test_a_file_that_two_entries_match_is_read_once(write_files: WriteFiles) -> None:
    root = write_files({"a.txt": "1", "b.txt": "2"})
    (root / "link.txt").symlink_to("b.txt")
    assert contents(files(root / "a.txt", f"{root}/*.txt")) == {"a.txt": b"1", "b.txt": b"2"}


def test_files_are_read_in_the_order_of_their_names(write_files: WriteFiles) -> None:
    root = write_files({"b.txt": "2", "c/a.txt": "1", "d.txt": "3"})
    assert list(contents(files(root / "d.txt", root / "b.txt", root / "c"))) == ["a.txt", "b.txt", "d.txt"]


def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    assert contents(files(tmp_path)) == {"caf\ufffd.txt": b"text"}


def test_json_lines_with_faults(write_files: WriteFiles) -> None:
    lines = [
        b'{"body": "good"}',
        b'{"body": "cut',
        b"",
        b'{"other": "x"}',
        b'{"body": 3}',
        b"[1]",
        b'{"body": "\xff"}',
        b"[" * 100_000,
    ]
    root = write_files({"x.jsonl": b"\xef\xbb\xbf" + b"\n".join(lines)})
    assert list(contents(files(root, text_field="body")).items()) == [
        ("x.jsonl#1", "good"),
        ("x.jsonl#2", Dropped.broken_json),
        ("x.jsonl#3", Dropped.empty),
        ("x.jsonl#4", Dropped.missing_field),
        ("x.jsonl#5", Dropped.missing_field),
        ("x.jsonl#6", Dropped.missing_field),
        ("x.jsonl#7", Dropped.bad_utf8),
        ("x.jsonl#8", Dropped.broken_json),
    ]


def test_parquet_over_row_groups(tmp_path: Path) -> None:
    table = pa.table({"id": range(5), "text": ["a", "b", None, "d", "e"], "raw": [b"A", b"B", b"C", b"D", b"E"]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    expected = {"x.parquet#1": "a", "x.parquet#2": "b", "x.parquet#3": Dropped.missing_field}
    assert contents(files(tmp_path, max_documents=3)) == expected
    assert list(contents(files(tmp_path, text_field="raw")).values()) == [b"A", b"B", b"C", b"D", b"E"]


def test_saved_and_plain_hugging_face_data_sets(tmp_path: Path, write_files: WriteFiles) -> None:
    saved = datasets.Dataset.from_dict({"text": ["one", None, "three"]})
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"dev": saved}).save_to_disk(tmp_path / "splits")
    plain = write_files({"train.jsonl": '{"text": "one"}\n{"text": null}\n{"text": "three"}\n'}, "plain")
    expected = {"train#1": "one", "train#2": Dropped.missing_field, "train#3": "three"}
    assert contents(huggingface(tmp_path / "saved")) == expected
    assert contents(huggingface(plain)) == expected
    assert list(contents(huggingface(tmp_path / "splits", dataset_split="dev"))) == ["dev#1", "dev#2", "dev#3"]


def test_sources_that_are_not_there_are_refused_up_front(tmp_path: Path, write_files: WriteFiles) -> None:
    datasets.DatasetDict({"dev": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "splits")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "x.parquet")
    broken = write_files({"y.parquet": b"PAR1 not really"}) / "y.parquet"
    empty = tmp_path / "empty"
    empty.mkdir()
    for config, message in [
        (files(tmp_path / "none.txt"), "data.corpus.paths=.*matches no file: '.*none.txt'"),
        (files(tmp_path / "x.parquet", empty), "data.corpus.paths=.*matches no file: '.*empty'"),
        (files(f"{tmp_path}/**/*.md"), r"data.corpus.paths=.*matches no file: '.*\*\.md'"),
        (files(tmp_path / "x.parquet"), "data.corpus.text_field=text is not a column of .*x.parquet.*'body'"),
        (files(broken), "data.corpus.paths matches .*y.parquet, which is not a parquet file"),
        (huggingface(tmp_path / "none"), "data.corpus.dataset=.*none is not an existing directory"),
        (huggingface(tmp_path / "splits"), "data.corpus.dataset_split=train is not a split of .*'dev'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_sources(config)


def test_faults_that_only_reading_a_data_set_shows(write_files: WriteFiles) -> None:
    plain = write_files({"train.jsonl": '{"body": "one"}\n'}, "plain")
    with pytest.raises(ConfigError, match=r"text_field=text is not a column of .*plain, which has \['body'\]"):
        contents(huggingface(plain))
    with pytest.raises(ConfigError, match=r"dataset_split=dev cannot be read: .*dev"):
        contents(huggingface(plain, text_field="body", dataset_split="dev"))


def test_fingerprint_sees_what_changed_outside(
    write_files: WriteFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_files({"a.txt": "1", "b.txt": "2"})
    config = files(root)
    before = fingerprint(config)
    assert fingerprint(config) == before == fingerprint(files(root / "*.txt")), "where the files lie does not matter"
    status = (root / "a.txt").stat()
    os.utime(root / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = fingerprint(config)
    (root / "c.txt").write_text("3")
    assert len({before, touched, fingerprint(config)}) == 3

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    saved = fingerprint(huggingface(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert fingerprint(huggingface(tmp_path / "saved")) != saved
    assert fingerprint(huggingface("owner/name")) != fingerprint(huggingface("owner/name", dataset_split="test"))

    library = fingerprint(CorpusConfig())
    monkeypatch.setattr(platform, "python_version", lambda: "3.11.99")
    assert fingerprint(CorpusConfig()) != library


@given(lines=st.lists(st.text(alphabet="ab\u00e9\U0001f600\r", max_size=12), max_size=12), max_bytes=st.integers(4, 20))
def test_pieces_of_a_long_file_lose_nothing(tmp_path_factory: Any, lines: list[str], max_bytes: int) -> None:
    path = tmp_path_factory.mktemp("pieces") / "long.txt"
    content = "\n".join(lines).encode()
    path.write_bytes(content)
    pieces = [document.content for document in read_documents(files(path, max_document_bytes=max_bytes))]
    assert all(isinstance(piece, bytes) for piece in pieces)
    assert b"".join(pieces) == content
    assert all(len(piece) <= max_bytes for piece in pieces)
    assert all(piece.decode() is not None for piece in pieces), "no character is cut in two"
    for piece, following in pairwise(pieces):
        assert piece.endswith(b"\n") or b"\n" not in (piece + following)[:max_bytes]


def test_pieces_are_numbered(write_files: WriteFiles) -> None:
    root = write_files({"long.txt": "one\ntwo\nthree\n", "short.txt": "one\n"})
    found = contents(files(root, max_document_bytes=9))
    assert found == {"long.txt#1": b"one\ntwo\n", "long.txt#2": b"three\n", "short.txt": b"one\n"}


def test_a_standard_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"data.corpus.source=stdlib finds no .py file"):
        check_sources(CorpusConfig())
