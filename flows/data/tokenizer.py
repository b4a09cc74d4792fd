"""Stage `tokenizer`: a byte-level BPE vocabulary, trained on text spread evenly over the train split."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flows.artifact import Artifact, digest_file, digest_json, write_json_atomically
from flows.config.checks import require
from flows.config.data import TokenizerConfig
from flows.data.conversations import CHAT_TEMPLATE, MESSAGE_END, MESSAGE_START
from flows.data.splits import read_documents_of

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
"""Of a tokenizer that is trained here."""
TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TOKEN_BYTES = "token_bytes.npy"
VOCABULARY_FILES = (TOKENIZER, SETTINGS, TEMPLATE, "config.json")
MAX_PIECE_CHARACTERS = 65_536
LONE_BYTE = re.compile("<0x[0-9A-F]{2}>")


def fingerprint(config: TokenizerConfig) -> str | None:
    """Digest of the existing tokenizer, where there is one: its path says nothing about its content."""
    if config.path is None:
        return None
    return digest_json(
        {name: digest_file(config.path / name) for name in VOCABULARY_FILES if (config.path / name).exists()}
    )


def build(directory: Path, config: TokenizerConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes `tokenizer.json`, `token_bytes.npy` (int64 [vocab]: UTF-8 bytes that each token stands for), and
    `tokenizer_config.json`, from which transformers takes the chat template.

    It is trained on all corpora by size, whatever their weights: it stays the same when those change.

    A corpus too small for `vocab_size` gives fewer tokens; the metric `vocab_size` says how many.

    Raises:
        ConfigError: `data.tokenizer.path` holds no tokenizer, or one without an end-of-text token.
    """
    check_tokenizer(config)
    if config.path is not None:
        return _adopt(directory, config.path)
    corpora = list(parents.values())
    texts = (text for corpus in corpora for _, text in read_documents_of(corpus.path, "train"))
    size = sum(corpus.metrics["splits"]["train"]["bytes"] for corpus in corpora)
    tokenizer = trained_tokenizer(spread_sample(texts, size, config.sample_bytes), config)
    tokenizer.save(str(directory / TOKENIZER))
    write_json_atomically(
        directory / SETTINGS,
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "chat_template": CHAT_TEMPLATE},
    )
    lengths = bytes_per_token(tokenizer)
    np.save(directory / TOKEN_BYTES, lengths)
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "requested_vocab_size": config.vocab_size,
        "longest_token_bytes": int(lengths.max()),
    }


def check_tokenizer(config: TokenizerConfig) -> None:
    """Raises `ConfigError` if `data.tokenizer.path` is set and holds no tokenizer."""
    require(
        config.path is None or (config.path / TOKENIZER).exists(),
        "data.tokenizer.path",
        config.path,
        f"has no {TOKENIZER}",
        "Name a Hugging Face model directory with a fast tokenizer, or a model that this project trained.",
    )


def _adopt(directory: Path, source: Path) -> Mapping[str, Any]:
    copy_tokenizer(source, directory)
    tokenizer = load_tokenizer(source)
    settings, model = (_read_json(source / name) for name in (SETTINGS, "config.json"))
    eos = settings.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos is None:
        index = model.get("eos_token_id")
        eos = tokenizer.id_to_token(index[0] if isinstance(index, list) else index) if index is not None else None
    require(
        eos is not None and tokenizer.token_to_id(eos) is not None,
        "data.tokenizer.path",
        source,
        f"names no end-of-text token that its tokenizer has: eos_token={eos!r}",
        f"Write eos_token into its {SETTINGS}.",
    )
    write_json_atomically(directory / SETTINGS, settings | {"eos_token": eos})
    lengths = bytes_per_token(tokenizer)
    rows = max(len(lengths), int(model.get("vocab_size", 0)))  # embeddings may be padded beyond the vocabulary
    np.save(directory / TOKEN_BYTES, np.pad(lengths, (0, rows - len(lengths))))
    return {"vocab_size": rows, "requested_vocab_size": rows, "longest_token_bytes": int(lengths.max())}


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies a tokenizer's files: those of a model directory, or of a tokenizer artifact."""
    for name in (TOKENIZER, SETTINGS, TEMPLATE):
        if (source / name).exists():
            shutil.copy(source / name, directory)


def end_of_text(directory: Path) -> str:
    """The token that closes a document, by the tokenizer's own files."""
    return str(_read_json(directory / SETTINGS).get("eos_token", END_OF_TEXT))


def end_of_text_id(directory: Path) -> int:
    """The id of that token."""
    index: int | None = load_tokenizer(directory).token_to_id(end_of_text(directory))
    assert index is not None
    return index


def vocabulary_size(directory: Path) -> int:
    """Rows of the embedding that the tokenizer of an artifact needs."""
    if (directory / TOKEN_BYTES).exists():
        return len(np.load(directory / TOKEN_BYTES, mmap_mode="r"))
    return load_tokenizer(directory).get_vocab_size()


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of an artifact, set to take text that spells a special token as the ordinary text it is."""
    tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
    tokenizer.encode_special_tokens = True
    return tokenizer


def trained_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE tokenizer that loses nothing: text is split as for GPT-2 and every byte has a token.

    The tokens of conversations are always in it, so that a model of plain text can be tuned on them later.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[END_OF_TEXT, MESSAGE_START, MESSAGE_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def spread_sample(texts: Iterable[str], total_bytes: int, sample_bytes: int) -> Iterator[str]:
    """Yields pieces of the texts, at most `sample_bytes` in all, spread evenly over them.

    Args:
        texts: The texts in order.
        total_bytes: UTF-8 bytes of all of them.
        sample_bytes: Bound on the UTF-8 bytes of all pieces together; all text is yielded whole if it fits.
    """
    if total_bytes <= sample_bytes:
        yield from texts
        return
    piece_characters = min(MAX_PIECE_CHARACTERS, max(1, sample_bytes // 64))
    seen_bytes = taken_bytes = 0
    for text in texts:
        for start in range(0, len(text), piece_characters):
            piece = text[start : start + piece_characters]
            size = len(piece.encode())
            seen_bytes += size
            if (taken_bytes + size) * total_bytes <= seen_bytes * sample_bytes:
                taken_bytes += size
                yield piece


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray[Any, np.dtype[np.int64]]:
    """UTF-8 bytes that each token stands for, int64 [vocab]; 0 for special tokens.

    A byte-level token is spelt with one character for each of its bytes; other vocabularies are spelt in text, with
    "\u2581" for a space and "<0x0A>" for a lone byte (SentencePiece).
    """
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.to_str())["decoder"])
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    for token, index in vocabulary.items():
        if token in added:
            lengths[index] = 0 if added[token] else len(token.encode())
        elif byte_level:
            lengths[index] = len(token)
        else:
            lengths[index] = 1 if LONE_BYTE.fullmatch(token) else len(token.replace("\u2581", " ").encode())
    return lengths
