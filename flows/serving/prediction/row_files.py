"""Rows of .jsonl and .parquet files: read in parts of a fixed size, written in parts, joined."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows.config import ConfigError, RunError

Texts = list[str | RunError]
"""A prompt for each row, or what is wrong with the row."""


@dataclass(frozen=True)
class Part:
    """Some rows that follow each other."""

    number: int
    first_row: int
    texts: Texts
    write: Callable[[Path, Mapping[str, pa.DataType], Mapping[str, Sequence[Any]]], None]
    """Writes the rows with further columns of these types and values to a new file."""


def count_rows(path: Path) -> int:
    """Number of rows: lines that are not blank, or rows of the table."""
    if path.suffix == ".parquet":
        return int(_open_parquet(path).metadata.num_rows)
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def read_parts(path: Path, field: str, new_columns: Sequence[str], rows: int) -> Iterator[Part]:
    """The file's rows, `rows` at a time.

    Args:
        path: .jsonl or .parquet.
        field: Column with the texts.
        new_columns: Columns that will be added.
        rows: Rows of a part.

    Raises:
        ConfigError: The file has no such column, or has one of the new ones already.
    """
    if path.suffix == ".parquet":
        return _parquet_parts(path, field, new_columns, rows)
    return _jsonl_parts(path, field, new_columns, rows)


def join_parts(parts: Sequence[Path], path: Path) -> None:
    """Writes the rows of all parts to one file, which appears whole or not at all."""
    aside = path.with_name(f".{path.name}.whole")
    if path.suffix == ".parquet":
        with pq.ParquetWriter(aside, pq.read_schema(parts[0])) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part))
    else:
        with aside.open("wb") as whole:
            for part in parts:
                with part.open("rb") as rows:
                    shutil.copyfileobj(rows, whole)
    _rename(aside, path)


def count_filled(path: Path, column: str) -> int:
    """Rows that have a value in a column."""
    if path.suffix == ".parquet":
        values = pq.read_table(path, columns=[column])[column]
        return len(values) - int(values.null_count)
    with path.open(encoding="utf-8") as lines:
        return sum(json.loads(line)[column] is not None for line in lines)


def _jsonl_parts(path: Path, field: str, new_columns: Sequence[str], rows: int) -> Iterator[Part]:
    with path.open("rb") as file:
        numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for part, lines in enumerate(_batched(numbered, rows)):
            objects = [_read_object(path, number, line) for number, line in lines]
            for row in objects:
                if isinstance(row, dict):
                    _check_columns(path, row, None, new_columns)
            texts: Texts = [row if isinstance(row, RunError) else _text(row.get(field), field) for row in objects]
            known = [row for row in objects if isinstance(row, dict)]
            if part == 0 and known and not any(field in row for row in known):
                _check_columns(path, known[0], field, new_columns)
            shown = [{} if isinstance(row, RunError) else row for row in objects]
            yield Part(part, part * rows, texts, _jsonl_writer(shown))


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _read_object(path: Path, number: int, line: bytes) -> dict[str, Any] | RunError:
    try:
        row = json.loads(line)
    except ValueError as error:  # bad UTF-8 too
        return RunError(f"line {number} of {path.name} is not JSON: {error}")
    return row if isinstance(row, dict) else RunError(f"line {number} of {path.name} is no JSON object")


def _jsonl_writer(rows: Sequence[Mapping[str, Any]]) -> Callable[..., None]:
    def write(path: Path, types: Mapping[str, pa.DataType], columns: Mapping[str, Sequence[Any]]) -> None:
        aside = path.with_name(f".{path.name}")
        with aside.open("w", encoding="utf-8") as file:
            for index, row in enumerate(rows):
                answer = {name: values[index] for name, values in columns.items()}
                whole = {**row, **answer}
                line = json.dumps(whole, ensure_ascii=False)
                file.write((line if _is_whole(line) else json.dumps(whole)) + "\n")
        _rename(aside, path)

    return write


def _parquet_parts(path: Path, field: str, new_columns: Sequence[str], rows: int) -> Iterator[Part]:
    file = _open_parquet(path)
    names = file.schema_arrow.names
    _check_columns(path, names, field, new_columns)
    kind = file.schema_arrow.field(field).type
    if not _holds_text(kind):
        raise ConfigError(f"predict.field={field} of {path} holds {kind}, not texts. Set another one, or convert it.")
    for part, batch in enumerate(file.iter_batches(batch_size=rows)):
        texts = [_text(value, field) for value in batch.column(field).to_pylist()]
        yield Part(part, part * rows, texts, _parquet_writer(pa.Table.from_batches([batch])))


def _parquet_writer(table: pa.Table) -> Callable[..., None]:
    def write(path: Path, types: Mapping[str, pa.DataType], columns: Mapping[str, Sequence[Any]]) -> None:
        wider = table
        for name, values in columns.items():
            wider = wider.append_column(name, pa.array(values, types[name]))
        aside = path.with_name(f".{path.name}")
        pq.write_table(wider, aside)
        _rename(aside, path)

    return write


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"predict.input={path} is not a Parquet file: {error}. Write it again.") from error


def _check_columns(path: Path, names: Any, field: str | None, new_columns: Sequence[str]) -> None:
    if field is not None and field not in names:
        raise ConfigError(f"predict.field={field} is no column of {path}, which has {list(names)}. Set one of them.")
    if taken := [name for name in new_columns if name in names]:
        raise ConfigError(
            f"predict.output_field={new_columns[0]} gives columns that {path} has already: {taken}. "
            f"Set predict.output_field=new_{new_columns[0]}."
        )


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_it(kind) for is_it in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_whole(text: str) -> bool:
    """Whether it can be encoded: no half of a character, which JSON can spell."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _text(value: object, field: str) -> str | RunError:
    if isinstance(value, str):
        return value if _is_whole(value) else RunError(f"{field} holds half of a character (a lone surrogate)")
    return RunError(f"{field} is missing" if value is None else f"{field} is no text: {type(value).__name__}")


def _rename(aside: Path, path: Path) -> None:
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.rename(path)
