"""What is read, how it is cleaned and split, and how text becomes token ids."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import gcd
from pathlib import Path

from pydantic import ConfigDict

from flows.config.checks import require, require_fraction, require_positive

MAIN = "main"
"""Name of `data.corpus` among several corpora."""
MAX_ROUND = 65_536


def corpus_role(name: str) -> str:
    """What a corpus of that name is called among a stage's inputs."""
    return "corpus" if name == MAIN else f"corpus_{name}"


def corpus_section(name: str) -> str:
    """Where the user sets a corpus, for messages."""
    return "data.corpus" if name == MAIN else f"data.mixture.{name}.corpus"


def corpus_name(role: str) -> str:
    """The name of the corpus that is called `role` among a stage's inputs."""
    return MAIN if role == "corpus" else role.removeprefix("corpus_")


class Source(StrEnum):
    """Where documents come from."""

    stdlib = "stdlib"
    files = "files"
    huggingface = "huggingface"


class Format(StrEnum):
    """What a document is."""

    text = "text"
    messages = "messages"
    prompt_completion = "prompt_completion"
    labelled = "labelled"


class UnicodeForm(StrEnum):
    """Unicode normal form that every document is brought to; `none` leaves text as it is."""

    none = "none"
    NFC = "NFC"
    NFKC = "NFKC"


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Raw documents to clean, split text."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    source: Source = Source.stdlib
    """`stdlib`: the source text of Python's standard library; `files`: `paths`; `huggingface`: `dataset`."""
    paths: tuple[str, ...] = ()
    """Files, directories or globs (`**` allowed) for `source=files`; .jsonl and .parquet by suffix, all else is one
    text document per file.
    Hidden files are read only if named."""
    format: Format = Format.text
    """`text`: plain text, all of which is learned; `messages`: conversations, a list of `role` (system, user,
    assistant, tool) and `content` in each record, of which the assistant's turns are learned; `prompt_completion`: one
    turn of each in two fields; `labelled`: a text and what it is, in two fields; of a text file its first folder says
    what it is, as in reviews/good/1.txt."""
    messages_field: str = "messages"
    """Field that holds the list of messages, for `format=messages`."""
    prompt_field: str = "prompt"
    """Field that holds what the user says, for `format=prompt_completion`."""
    completion_field: str = "completion"
    """Field that holds what the assistant answers, for `format=prompt_completion`."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and Hugging Face data."""
    label_field: str = "label"
    """Field that holds what the text is, for `format=labelled`: words, a whole number, true or false."""
    labels: tuple[str, ...] = ()
    """What a text can be, in the order of the model's scores, for `format=labelled`; texts with any other label are
    dropped and counted. Empty = whatever the training split holds, sorted."""
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
        require(
            self.format in (Format.text, Format.labelled) or self.source != Source.stdlib,
            "data.corpus.format",
            self.format,
            "is not what data.corpus.source=stdlib holds: source text",
            "Set data.corpus.source=files and data.corpus.paths=[chats.jsonl].",
        )
        require(
            not self.labels or self.format == Format.labelled,
            "data.corpus.labels",
            list(self.labels),
            f"are not read with data.corpus.format={self.format}",
            "Set data.corpus.format=labelled, or data.corpus.labels=[].",
        )
        require(
            not self.labels or 2 <= len(self.labels) == len(set(self.labels)),
            "data.corpus.labels",
            list(self.labels),
            "must be two or more, each of them once: there is nothing to tell apart otherwise",
            "Set data.corpus.labels=[good,bad], or [] for whatever there is.",
        )

    @property
    def field_settings(self) -> tuple[str, ...]:
        """The settings that name `fields`."""
        match self.format:
            case Format.text:
                return ("text_field",)
            case Format.messages:
                return ("messages_field",)
            case Format.prompt_completion:
                return ("prompt_field", "completion_field")
            case Format.labelled:
                return ("text_field", "label_field")

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a record that are read."""
        return tuple(getattr(self, setting) for setting in self.field_settings)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Byte-level BPE tokenizer, trained on the train split, or that of a model to be tuned."""

    directory: Path | None = None
    """Hugging Face directory whose byte-level tokenizer.json is taken as it is, with config.json's vocab_size and
    eos_token_id; null = a tokenizer is trained. What `model.initial_weights` need: ${model.initial_weights}."""
    vocab_size: int = 4096
    """Number of tokens, the 3 special tokens and the 256 bytes included."""
    min_frequency: int = 2
    """A pair seen less often is not merged."""
    sample_bytes: int = 67_108_864
    """Training reads at most this much text, spread evenly over the split, so that memory stays flat in corpus size."""

    def __post_init__(self) -> None:
        require(
            256 + 3 <= self.vocab_size <= 2**31,
            "data.tokenizer.vocab_size",
            self.vocab_size,
            "must hold the 256 bytes and 3 special tokens: 259 or more",
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
    max_conversation_tokens: int | None = None
    """Longer conversations are cut, keeping their beginning, and counted, as are labelled texts; null = what a sequence
    holds."""

    def __post_init__(self) -> None:
        require_positive("data.encode", self, ["shard_bytes", "batch_bytes"])
        require(
            self.max_conversation_tokens is None or self.max_conversation_tokens >= 8,
            "data.encode.max_conversation_tokens",
            self.max_conversation_tokens,
            "must be 8 or more",
            "Leave it null: what fits into a sequence.",
        )


@dataclass(frozen=True, kw_only=True)
class MixedCorpus:
    """A further corpus of a mixture."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # entries have names of the user's: OmegaConf cannot check them
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    weight: int = 1
    """Sequences from it for every `data.main_weight` sequences of the main corpus."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Raw data to packed token ids."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The main corpus, and the only one unless there is a mixture."""
    mixture: dict[str, MixedCorpus] = field(default_factory=dict)
    """Further corpora by name, each with `corpus` and `weight`. Any stretch of training and evaluation holds the shares
    that the weights set, to within one sequence each; a corpus small for its weight is repeated, and how often is
    reported."""
    main_weight: int = 1
    """Weight of the main corpus in a mixture."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    sequence_length: int = 256
    """Tokens in a training sequence, and the longest context that the model is served with."""
    document_masks: bool = True
    """No attention across the documents that share a sequence, positions start anew with each, and what follows an
    end-of-text token is not predicted: a document then trains as it is served, alone. As in Llama 3 (arXiv:2407.21783,
    3.2); better than attending across them (arXiv:2402.13991)."""

    def __post_init__(self) -> None:
        self._check_mixture()
        for name, corpus in self.corpora.items():
            require(
                corpus.format != Format.labelled or not self.mixture,
                f"{corpus_section(name)}.format",
                corpus.format,
                "cannot be combined with data.mixture: labels are those of one corpus",
                "Put all labelled texts into data.corpus.paths, and leave data.mixture out.",
            )
        require(
            self.sequence_length >= 8,
            "data.sequence_length",
            self.sequence_length,
            "must be 8 or more",
            "Set data.sequence_length=256.",
        )

    @property
    def corpora(self) -> dict[str, CorpusConfig]:
        """All corpora by name, the main one first."""
        return {MAIN: self.corpus} | {name: mixed.corpus for name, mixed in self.mixture.items()}

    @property
    def weights(self) -> dict[str, int]:
        """Weights of the corpora by name, the main one first; empty if it is the only one."""
        if not self.mixture:
            return {}
        return {MAIN: self.main_weight} | {name: mixed.weight for name, mixed in self.mixture.items()}

    def encoding(self) -> EncodeConfig:
        """The section of the tokens stage: with the length of a conversation, where there are conversations."""
        if all(corpus.format == Format.text for corpus in self.corpora.values()):
            return self.encode
        room = self.sequence_length if self.corpus.format == Format.labelled else self.sequence_length + 1
        longest = self.encode.max_conversation_tokens or room
        return replace(self.encode, max_conversation_tokens=min(longest, room))

    def _check_mixture(self) -> None:
        for name in self.mixture:
            require(
                re.fullmatch(r"[a-z0-9][a-z0-9_]*", name) is not None and name != MAIN,
                "data.mixture",
                list(self.mixture),
                f"has a corpus called {name!r}; a name is lower case letters, digits and '_', and not {MAIN!r}, which "
                "is data.corpus",
                "Give it another name.",
            )
        for field_name, weight in [("main_weight", self.main_weight)] + [
            (f"mixture.{name}.weight", mixed.weight) for name, mixed in self.mixture.items()
        ]:
            require(
                weight > 0,
                f"data.{field_name}",
                weight,
                "must be greater than 0",
                "Set whole numbers such as 3 and 1, or leave the corpus out.",
            )
        weights = list(self.weights.values()) or [1]
        total = sum(weights) // gcd(*weights)
        require(
            total <= MAX_ROUND,
            "data.main_weight",
            self.main_weight,
            f"and the weights of data.mixture, {weights[1:]}, repeat after {total} sequences, more than {MAX_ROUND}",
            "Round them to smaller whole numbers, such as 3 and 1.",
        )
