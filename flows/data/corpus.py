"""Stage `corpus`: raw documents to cleaned, deduplicated text in train, validation and test splits."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flows.artifact import Artifact
from flows.config.checks import ConfigError, require
from flows.config.data import CorpusConfig, Format
from flows.data import sources
from flows.data.cleaning import Dropped, usable_text
from flows.data.labelled import label_of, with_folder_label

NAMED_PER_REASON = 5
"""Dropped documents that the metrics name, for each reason."""
logger = logging.getLogger(__name__)


def fingerprint(config: CorpusConfig) -> str:
    """Hex digest of the state of the files or the data set that the documents come from."""
    return sources.fingerprint(config)


def build(directory: Path, config: CorpusConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes `train.parquet`, `validation.parquet` and `test.parquet` with columns `name` and `text`, `messages` or
    `labelled`.

    Pieces of a file all have its label: they go to the same split, so that none is recognized by its neighbours.

    Raises:
        ConfigError: No document, or fewer than there are splits, is usable; the message counts why.
    """
    from flows.data.splits import SplitWriter  # pyarrow is not needed to find a corpus that exists

    read_documents = read_bytes = 0
    dropped: Counter[Dropped] = Counter()
    first_dropped: dict[Dropped, list[str]] = {reason: [] for reason in Dropped}
    writer = SplitWriter(directory, config)
    with _SeenTexts() as seen, tqdm(desc="corpus", unit="B", unit_scale=True, disable=None) as progress:
        for document in sources.read_documents(config):
            read_documents += 1
            content, group = document.content, None
            is_file = isinstance(content, bytes)
            if not isinstance(content, Dropped):
                size = len(content) if isinstance(content, bytes) else len(content.encode(errors="surrogatepass"))
                read_bytes += size
                progress.update(size)
                content = usable_text(content, config)
            if config.format == Format.labelled and is_file and not isinstance(content, Dropped):
                content = with_folder_label(document.name, content, config)
                group = document.name.partition("#")[0]
            if not isinstance(content, Dropped) and not seen.add(content):
                content = Dropped.duplicate
            if isinstance(content, Dropped):
                dropped[content] += 1
                if dropped[content] <= NAMED_PER_REASON:
                    first_dropped[content].append(document.name)
            else:
                writer.write(document.name, content, group)
    if read_documents == dropped.total():
        raise ConfigError(_nothing_usable(config, read_documents, dropped))
    writer.finish()
    if dropped:
        left_out = f"{dropped.total():,} of {read_documents:,} documents are left out"
        logger.warning("%s: %s", left_out, _counted(dropped))
    labels = {"labels": _labels(directory, config)} if config.format == Format.labelled else {}
    return {
        "read": {"documents": read_documents, "bytes": read_bytes},
        "splits": writer.sizes,
        **labels,
        "dropped": {reason.value: {"documents": dropped[reason], "first": first_dropped[reason]} for reason in Dropped},
    }


def _labels(directory: Path, config: CorpusConfig) -> dict[str, Any]:
    """`names` of the labels that are learnt, in order, and of each split how many `texts` have which label.

    Raises:
        ConfigError: The training split lacks one of `config.labels`, or has fewer than two.
    """
    from flows.data.splits import SPLITS, read_stored

    counts = {split: Counter(label_of(text) for _, text in read_stored(directory, split)) for split in SPLITS}
    learnt = counts["train"]
    names = config.labels or tuple(sorted(learnt))
    lacking = [name for name in names if not learnt[name]]
    require(
        not lacking and len(names) >= 2,
        "data.corpus.labels",
        list(names),
        f"cannot be learnt from the training split, which holds {dict(learnt)}",
        "Give texts of two or more labels, look at data.corpus.label_field, or leave out labels that do not occur.",
    )
    return {"names": list(names), "texts": {split: dict(sorted(count.items())) for split, count in counts.items()}}


def _nothing_usable(config: CorpusConfig, read_documents: int, dropped: Counter[Dropped]) -> str:
    fields = " and ".join(f"data.corpus.{name}={getattr(config, name)}" for name in config.field_settings)
    return (
        f"data.corpus.source={config.source} gives no usable document: {read_documents} read "
        f"({_counted(dropped) or 'nothing there'}). Check what data.corpus.paths or dataset points at, {fields} where "
        f"there are fields, and data.corpus.min_document_bytes={config.min_document_bytes}."
    )


def _counted(dropped: Counter[Dropped]) -> str:
    return ", ".join(f"{count:,} {reason.value}" for reason, count in dropped.most_common())


class _SeenTexts:
    """Remembers texts by digest, in a private file that SQLite deletes, so that memory stays flat."""

    def __enter__(self) -> _SeenTexts:
        self._database = sqlite3.connect("", isolation_level=None)  # an empty name is a temporary database on disk
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("PRAGMA cache_size = -32768")  # in KiB
        self._database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(self, text: str) -> bool:
        """Whether the text was not there before."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1
