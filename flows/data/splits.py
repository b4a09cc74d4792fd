"""The train, validation and test documents on disk: which document belongs where, how they are written and read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flows.config.checks import ConfigError
from flows.config.data import CorpusConfig, Format
from flows.data.conversations import plain_text
from flows.data.labelled import text_of

SPLITS = ("train", "validation", "test")
ROW_GROUP_BYTES = 8_388_608
"""Text held in memory before it is written, and read at once."""
TEXT, MESSAGES, LABELLED = "text", "messages", "labelled"
"""Column of a corpus of plain text, of one of conversations (messages as JSON), and of one of texts with labels (both
as JSON)."""
COLUMNS = {Format.text: TEXT, Format.labelled: LABELLED}


def read_documents_of(directory: Path, split: str) -> Iterator[tuple[str, str]]:
    """Iterates over (name, text) of a split of a corpus artifact; a conversation's text is what its messages say."""
    readers: dict[str, Callable[[str], str]] = {TEXT: str, MESSAGES: plain_text, LABELLED: text_of}
    text = readers[stored_kind(directory)]
    for name, content in read_stored(directory, split):
        yield name, text(content)


def stored_kind(directory: Path) -> str:
    """What a corpus artifact holds: `TEXT`, `MESSAGES` or `LABELLED`."""
    _, kind = pq.read_schema(directory / f"{SPLITS[0]}.parquet").names
    return str(kind)


def read_stored(directory: Path, split: str) -> Iterator[tuple[str, str]]:
    """Iterates over (name, text or JSON) of a split, at most one row group in memory."""
    with pq.ParquetFile(directory / f"{split}.parquet", buffer_size=2**20) as file:
        for index in range(file.num_row_groups):
            rows = file.read_row_group(index, use_threads=False)
            yield from zip(rows.column(0).to_pylist(), rows.column(1).to_pylist(), strict=True)


def split_by_name(name: str, config: CorpusConfig) -> str:
    """The split that the name's hash falls into: it stays the same when other documents come or go."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    if share < config.test_fraction:
        return "test"
    return "validation" if share < config.test_fraction + config.validation_fraction else "train"


class SplitWriter:
    """Writes documents into one parquet file per split; no split with a share of the corpus stays empty.

    As many documents as there are such splits are held back until the end. Each then goes where its name's hash says,
    unless a split would have none: it gets the last one held back whose own split has another.
    """

    def __init__(self, directory: Path, config: CorpusConfig) -> None:
        self._config = config
        shares = {"train": 1.0, "validation": config.validation_fraction, "test": config.test_fraction}
        self._wanted = [split for split in SPLITS if shares[split] > 0]
        self._held: list[tuple[str, str, str]] = []
        column = COLUMNS.get(config.format, MESSAGES)
        self._files = {split: _ParquetWriter(directory / f"{split}.parquet", column) for split in SPLITS}

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """Documents and bytes of text in each split, by split."""
        return {split: {"documents": file.documents, "bytes": file.bytes} for split, file in self._files.items()}

    def write(self, name: str, text: str, group: str | None = None) -> None:
        """Adds a document, to the split that its group belongs to; None = its name is."""
        group = group or name
        if len(self._held) < len(self._wanted):
            self._held.append((name, text, group))
        else:
            self._files[split_by_name(group, self._config)].write(name, text)

    def finish(self) -> None:
        """Writes what was held back and closes the files.

        Raises:
            ConfigError: There are fewer documents than splits to fill.
        """
        if 0 < len(self._held) < len(self._wanted):
            raise ConfigError(
                f"data.corpus.validation_fraction={self._config.validation_fraction} with "
                f"test_fraction={self._config.test_fraction} needs at least {len(self._wanted)} usable documents, one "
                f"for each split; there are {len(self._held)}, once equal ones are counted as one. Give more "
                "documents, or cut a long text file at its line ends by setting data.corpus.max_document_bytes."
            )
        chosen = [split_by_name(group, self._config) for _, _, group in self._held]
        for split in self._wanted:
            if not self._documents_in(split, chosen):
                donor = max(i for i, other in enumerate(chosen) if self._documents_in(other, chosen) > 1)
                chosen[donor] = split
        for (name, text, _), split in zip(self._held, chosen, strict=True):
            self._files[split].write(name, text)
        for file in self._files.values():
            file.close()

    def _documents_in(self, split: str, chosen: list[str]) -> int:
        return self._files[split].documents + chosen.count(split)


class _ParquetWriter:
    """Buffers rows up to `ROW_GROUP_BYTES` of text."""

    def __init__(self, path: Path, column: str) -> None:
        self.documents = 0
        self.bytes = 0
        self._schema = pa.schema([("name", pa.string()), (column, pa.string())])
        self._file = pq.ParquetWriter(
            path, self._schema, compression="zstd", use_dictionary=False, write_statistics=False
        )
        self._names: list[str] = []
        self._texts: list[str] = []
        self._buffered_bytes = 0

    def write(self, name: str, text: str) -> None:
        size = len(text.encode())
        self.documents += 1
        self.bytes += size
        self._names.append(name)
        self._texts.append(text)
        self._buffered_bytes += size
        if self._buffered_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if self._names:
            self._file.write_table(pa.table([self._names, self._texts], schema=self._schema))
        self._names, self._texts, self._buffered_bytes = [], [], 0
