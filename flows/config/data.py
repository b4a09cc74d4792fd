"""What is read, how it is cleaned and split, and how text becomes token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from flows.config.checks import require, require_fraction, require_positive


class Source(StrEnum):
    """Where documents come from."""

    stdlib = "stdlib"
    files = "files"
    huggingface = "huggingface"


class UnicodeForm(StrEnum):
    """Unicode normal form that every document is brought to; `none` leaves text as it is."""

    none = "none"
    NFC = "NFC"
    NFKC = "NFKC"


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Raw documents to clean, split text."""

    source: Source = Source.stdlib
    """`stdlib`: the source text of Python's standard library; `files`: `paths`; `huggingface`: `dataset`."""
    paths: tuple[str, ...] = ()
    """Files, directories or globs (`**` allowed) for `source=files`; .jsonl and .parquet by suffix, all else is one
    text document per file.
    Hidden files are read only if named."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and Hugging Face data."""
    dataset: str | None = None
    """Hugging Face `datasets` name, or the path of a saved data set, for `source=huggingface`."""
    dataset_config: str | None = None
    """Configuration name of `dataset`, where it has several."""
    dataset_split: str = "train"
    """Split of `dataset` that is read."""
    max_documents: int | None = None
    """Reads at most this many documents, in sorted order; none = all."""
    unicode_form: UnicodeForm = UnicodeForm.NFC
    """Unicode normal form of the cleaned text."""
    min_document_bytes: int = 1
    """Shorter documents, after cleaning, are dropped and counted."""
    max_document_bytes: int = 1_048_576
    """A longer text file is cut at line ends into documents of at most this size: memory stays flat in file size."""
    validation_fraction: float = 0.03
    """Share of documents, chosen by a hash of their name, held out for validation."""
    test_fraction: float = 0.03
    """Share of documents held out for the final evaluation."""

    def __post_init__(self) -> None:
        require_positive("data.corpus", self, ["min_document_bytes", "max_document_bytes"])
        require_fraction("data.corpus", self, ["validation_fraction", "test_fraction"])
        held_out = self.validation_fraction + self.test_fraction
        require(
            held_out < 1,
            "data.corpus.validation_fraction",
            self.validation_fraction,
            f"leaves nothing to train on: with data.corpus.test_fraction={self.test_fraction} it holds out "
            f"{held_out:g} of all documents",
            "Set both so that their sum is below 1.",
        )
        require(
            self.max_documents is None or self.max_documents > 0,
            "data.corpus.max_documents",
            self.max_documents,
            "must be greater than 0",
            "Set it to null to read everything.",
        )
        require(
            self.source != Source.files or len(self.paths) > 0,
            "data.corpus.source",
            self.source,
            "needs at least one path",
            "Set data.corpus.paths=[my_text/**/*.txt].",
        )
        require(
            self.source != Source.huggingface or bool(self.dataset),
            "data.corpus.source",
            self.source,
            "needs a data set",
            "Set data.corpus.dataset to a Hugging Face name or a saved data set's directory.",
        )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Byte-level BPE tokenizer, trained on the train split, or that of a model to be tuned."""

    directory: Path | None = None
    """Hugging Face directory whose byte-level tokenizer.json is taken as it is, with config.json's vocab_size and
    eos_token_id; null = a tokenizer is trained. What `model.initial_weights` need: ${model.initial_weights}."""
    vocab_size: int = 4096
    """Number of tokens, special tokens and the 256 bytes included."""
    min_frequency: int = 2
    """A pair seen less often is not merged."""
    sample_bytes: int = 67_108_864
    """Training reads at most this much text, spread evenly over the split, so that memory stays flat in corpus size."""

    def __post_init__(self) -> None:
        require(
            256 + 1 <= self.vocab_size <= 2**31,
            "data.tokenizer.vocab_size",
            self.vocab_size,
            "must hold the 256 bytes and one special token: 257 or more",
            "Set data.tokenizer.vocab_size=4096.",
        )
        require_positive("data.tokenizer", self, ["min_frequency", "sample_bytes"])


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Text to memory-mapped shards of token ids."""

    shard_bytes: int = 268_435_456
    """A shard is closed when it reaches this size."""
    batch_bytes: int = 1_048_576
    """Text that each core encodes at once; bounds memory."""

    def __post_init__(self) -> None:
        require_positive("data.encode", self, ["shard_bytes", "batch_bytes"])


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Raw data to packed token ids."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    sequence_length: int = 256
    """Tokens in a training sequence, and the longest context that the model is served with."""

    def __post_init__(self) -> None:
        require(
            self.sequence_length >= 8,
            "data.sequence_length",
            self.sequence_length,
            "must be 8 or more",
            "Set data.sequence_length=256.",
        )
