"""Raw documents from the standard library, local files and Hugging Face data sets, one at a time, in a fixed order."""

from __future__ import annotations

import glob
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flows.artifact import digest_json
from flows.config.checks import ConfigError, require
from flows.config.data import CorpusConfig, Format, Source
from flows.data.cleaning import Dropped
from flows.data.conversations import conversation_of
from flows.data.labelled import labelled_of

INSTALLED_PACKAGES = ("site-packages", "dist-packages")
SAVED_SPLITS = "dataset_dict.json"
"""Lists the splits of a data set that `datasets` saved to disk."""


@dataclass(frozen=True, slots=True)
class Document:
    """One raw document."""

    name: str
    """File relative to the configured path it was found under; `#<line, row or piece>` where a file holds several."""
    content: bytes | str | Dropped
    """The raw text, or why the source has none to give."""


@dataclass(frozen=True, slots=True)
class _SourceFile:
    name: str
    path: Path


def check_sources(config: CorpusConfig) -> None:
    """Refuses, without reading any document, sources that do not exist or lack the configured text field.

    Names of data sets on the Hugging Face hub are only checked when they are read.

    Raises:
        ConfigError: A path matches nothing, a parquet file or saved data set lacks the field or split.
    """
    if config.source != Source.huggingface:
        for file in _source_files(config):
            _require_records(file, config)
            if file.path.suffix == ".parquet":
                _open_parquet(file.path, config)
        return
    dataset = str(config.dataset)
    directory = _dataset_directory(config)
    if directory and (directory / SAVED_SPLITS).exists():
        splits = json.loads((directory / SAVED_SPLITS).read_text())["splits"]
        require(
            config.dataset_split in splits,
            "data.corpus.dataset_split",
            config.dataset_split,
            f"is not a split of {dataset}, which has {splits}",
            f"Set data.corpus.dataset_split={splits[0]}.",
        )
    looks_like_path = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    require(
        directory is not None or not looks_like_path,
        "data.corpus.dataset",
        dataset,
        "is not an existing directory",
        "Give the directory of a data set, or a name on the Hugging Face hub such as owner/name.",
    )


def fingerprint(config: CorpusConfig) -> str:
    """Hex digest of the state of everything outside that the documents come from, without reading them.

    Local files count by name, size and time of change; a data set on the hub by name, configuration and split.
    """
    state: list[Any] = [platform.python_version()] if config.source == Source.stdlib else []
    directory = _dataset_directory(config)
    if config.source != Source.huggingface:
        files = _source_files(config)
    elif directory is not None:
        files = _files_below(directory, "**/*")
    else:
        files = []
        state += [config.dataset, config.dataset_config, config.dataset_split]
    for file in files:
        status = file.path.stat()
        state.append([file.name, status.st_size, status.st_mtime_ns])
    return digest_json(state)


def read_documents(config: CorpusConfig) -> Iterator[Document]:
    """Iterates over the raw documents, at most one file piece, line, row batch or example in memory.

    Raises:
        ConfigError: A source does not exist, is not readable as what it claims to be, or lacks the text field.
    """
    return islice(_all_documents(config), config.max_documents)


def _all_documents(config: CorpusConfig) -> Iterator[Document]:
    if config.source == Source.huggingface:
        yield from _dataset_documents(config)
        return
    for file in _source_files(config):
        match file.path.suffix:
            case ".jsonl":
                yield from _json_lines(file, config)
            case ".parquet":
                yield from _parquet_rows(file, config)
            case _:
                _require_records(file, config)
                yield from _text_pieces(file, config.max_document_bytes)


def _require_records(file: _SourceFile, config: CorpusConfig) -> None:
    require(
        config.format in (Format.text, Format.labelled) or file.path.suffix in (".jsonl", ".parquet"),
        "data.corpus.format",
        config.format,
        f"is read from .jsonl and .parquet files, and data.corpus.paths matches {file.path}",
        "Leave that file out, or set data.corpus.format=text.",
    )


def _source_files(config: CorpusConfig) -> list[_SourceFile]:
    if config.source == Source.stdlib:
        return _standard_library(Path(sysconfig.get_path("stdlib")))
    found: dict[Path, _SourceFile] = {}
    for entry in config.paths:
        matched = _matching_files(Path(entry).expanduser())
        require(
            len(matched) > 0,
            "data.corpus.paths",
            list(config.paths),
            f"has an entry that matches no file: {entry!r}, seen from {Path.cwd()}",
            "Give files, directories that hold files, or globs such as texts/**/*.txt; hidden files need to be named.",
        )
        for file in matched:
            found.setdefault(file.path.resolve(), file)  # a file that two entries match is read once
    return sorted(found.values(), key=lambda file: file.name)


def _standard_library(root: Path) -> list[_SourceFile]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in INSTALLED_PACKAGES]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files += [_SourceFile(path.relative_to(root).as_posix(), path) for path in paths]
    require(len(files) > 0, "data.corpus.source", "stdlib", f"finds no .py file below {root}", "Set source=files.")
    return sorted(files, key=lambda file: file.name)


def _matching_files(entry: Path) -> list[_SourceFile]:
    if entry.is_file():
        return [_SourceFile(_printable(entry.name), entry)]
    if entry.is_dir():
        return _files_below(entry, "**/*")
    parts = entry.parts
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return _files_below(Path(*parts[:fixed]), os.path.join(*parts[fixed:])) if fixed < len(parts) else []


def _files_below(root: Path, pattern: str) -> list[_SourceFile]:
    matches = sorted(set(glob.glob(pattern, root_dir=root, recursive=True)))
    files = [_SourceFile(_printable(Path(match).as_posix()), root / match) for match in matches]
    return [file for file in files if file.path.is_file()]


def _printable(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")  # a file's name need not be UTF-8


def _text_pieces(file: _SourceFile, max_bytes: int) -> Iterator[Document]:
    """The file as one document, or, if it is longer than `max_bytes`, cut after the last line end within them."""
    with file.path.open("rb") as stream:
        piece = stream.read(max_bytes + 1)
        if len(piece) <= max_bytes:
            yield Document(file.name, piece)
            return
        number = 0
        while piece:
            cut = _piece_end(piece, max_bytes)
            number += 1
            yield Document(f"{file.name}#{number}", piece[:cut])
            rest = piece[cut:]
            piece = rest + stream.read(max_bytes + 1 - len(rest))


def _piece_end(text: bytes, max_bytes: int) -> int:
    if len(text) <= max_bytes:
        return len(text)
    line_end = text.rfind(b"\n", 0, max_bytes) + 1
    if line_end:
        return line_end
    end = max_bytes
    while end > max(1, max_bytes - 3) and text[end] & 0xC0 == 0x80:  # inside a UTF-8 character of at most 4 bytes
        end -= 1
    return end


def _json_lines(file: _SourceFile, config: CorpusConfig) -> Iterator[Document]:
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield Document(f"{file.name}#{number}", _json_text(line, config))


def _json_text(line: bytes, config: CorpusConfig) -> bytes | str | Dropped:
    if not line.strip():
        return Dropped.empty
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Dropped.bad_utf8
    except (ValueError, RecursionError):
        return Dropped.broken_json
    return _content_of(record, config)


def _content_of(record: Any, config: CorpusConfig) -> bytes | str | Dropped:
    if config.format == Format.labelled:
        return labelled_of(record, config)
    if config.format != Format.text:
        return conversation_of(record, config)
    value = record.get(config.text_field) if isinstance(record, dict) else None
    return value if isinstance(value, str | bytes) else Dropped.missing_field


def _open_parquet(path: Path, config: CorpusConfig) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"data.corpus.paths matches {path}, which is not a parquet file: {error}. Mend or leave it out."
        ) from error
    _require_fields(config, path, file.schema_arrow.names)
    return file


def _require_fields(config: CorpusConfig, where: object, columns: list[str]) -> None:
    for setting, field in zip(config.field_settings, config.fields, strict=True):
        require(
            field in columns,
            f"data.corpus.{setting}",
            field,
            f"is not a column of {where}, which has {columns}",
            f"Set data.corpus.{setting} to the column that holds the {setting.removesuffix('_field')}.",
        )


def _parquet_rows(file: _SourceFile, config: CorpusConfig) -> Iterator[Document]:
    parquet = _open_parquet(file.path, config)
    columns = list(config.fields)
    number = 0
    for index in range(parquet.num_row_groups):
        for batch in parquet.iter_batches(batch_size=256, row_groups=[index], columns=columns, use_threads=False):
            for record in batch.to_pylist():
                number += 1
                yield Document(f"{file.name}#{number}", _content_of(record, config))


def _dataset_directory(config: CorpusConfig) -> Path | None:
    directory = Path(config.dataset or "").expanduser()
    return directory if config.dataset and directory.is_dir() else None


def _dataset_documents(config: CorpusConfig) -> Iterator[Document]:
    for number, example in enumerate(_examples(config), 1):
        _require_fields(config, config.dataset, sorted(example))
        yield Document(f"{config.dataset_split}#{number}", _content_of(example, config))


def _examples(config: CorpusConfig) -> Iterator[dict[str, Any]]:
    """Examples of a directory written by `save_to_disk`, memory-mapped, or of any other data set, streamed."""
    import datasets

    directory = _dataset_directory(config)
    try:
        if directory and ((directory / SAVED_SPLITS).exists() or (directory / "state.json").exists()):
            saved = datasets.load_from_disk(str(directory))
            yield from saved[config.dataset_split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            name = str(directory or config.dataset)
            yield from datasets.load_dataset(name, config.dataset_config, split=config.dataset_split, streaming=True)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"data.corpus.dataset={config.dataset} with dataset_config={config.dataset_config} and "
            f"dataset_split={config.dataset_split} cannot be read: {error}. Mend the names or the data, or check "
            "the network."
        ) from error
