"""Stage `tokenizer`: a byte-level BPE vocabulary, trained on text spread evenly over the train split."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flows.artifact import Artifact, digest_file, digest_json, write_json_atomically
from flows.config.data import TokenizerConfig
from flows.data.adopted_tokenizer import adopt_tokenizer, mask_token
from flows.data.conversations import CHAT_TEMPLATE, MESSAGE_END, MESSAGE_START
from flows.data.splits import read_documents_of

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE_FILE)
MAX_PIECE_CHARACTERS = 65_536


def fingerprint(config: TokenizerConfig) -> str | None:
    """Digest of the tokenizer that is taken as it is, where there is one."""
    if config.directory is None:
        return None
    files = [config.directory / name for name in ("config.json", *TOKENIZER_FILES)]
    return digest_json({path.name: digest_file(path) for path in files if path.exists()})


def build(directory: Path, config: TokenizerConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes `tokenizer.json`, `token_bytes.npy` (int64 [vocab]: UTF-8 bytes that each token stands for), and
    `tokenizer_config.json`, from which transformers takes the chat template.

    It is trained on all corpora by size, whatever their weights: it stays the same when those change.

    That of `config.directory`, where there is one, is taken as it is.

    A corpus too small for `vocab_size` gives fewer tokens; the metric `vocab_size` says how many.
    """
    if config.directory is not None:
        return adopt_tokenizer(config.directory, directory)
    corpora = list(parents.values())
    texts = (text for corpus in corpora for _, text in read_documents_of(corpus.path, "train"))
    size = sum(corpus.metrics["splits"]["train"]["bytes"] for corpus in corpora)
    tokenizer = trained_tokenizer(spread_sample(texts, size, config.sample_bytes), config)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json_atomically(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "chat_template": CHAT_TEMPLATE},
    )
    lengths = bytes_per_token(tokenizer)
    np.save(directory / "token_bytes.npy", lengths)
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "requested_vocab_size": config.vocab_size,
        "longest_token_bytes": int(lengths.max()),
    }


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of an artifact, set to take text that spells a special token as the ordinary text it is."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()  # an adopted one may be set to cut texts at its model's longest input, or to fill them up
    tokenizer.no_padding()
    return tokenizer


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the files of a tokenizer artifact, or of a model that carries them, to a model's directory."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, directory)


def end_of_text(directory: Path) -> str:
    """The token of a tokenizer artifact, or of a model, that closes a document."""
    described = directory / "tokenizer_config.json"
    return str(json.loads(described.read_text())["eos_token"]) if described.exists() else END_OF_TEXT


def mask_token_id(directory: Path) -> int:
    """The id of the token that stands in the place of a hidden one."""
    token = mask_token(directory)
    index: int | None = None if token is None else load_tokenizer(directory).token_to_id(token)
    assert index is not None, f"the tokenizer in {directory} lacks a mask token"
    return index


def chat_template(directory: Path) -> str:
    """How a tokenizer artifact, or a model, turns messages into text (Jinja); ours where it does not say."""
    if (directory / CHAT_TEMPLATE_FILE).exists():
        return (directory / CHAT_TEMPLATE_FILE).read_text()
    described = directory / "tokenizer_config.json"
    stated = json.loads(described.read_text()).get("chat_template") if described.exists() else None
    return stated if isinstance(stated, str) else CHAT_TEMPLATE


def end_of_text_id(directory: Path) -> int:
    """The id of that token."""
    index: int | None = load_tokenizer(directory).token_to_id(end_of_text(directory))
    assert index is not None, f"the tokenizer in {directory} lacks {end_of_text(directory)}"
    return index


def vocabulary_size(directory: Path) -> int:
    """Number of tokens of a tokenizer artifact, unused ones of an adopted vocabulary included."""
    return len(np.load(directory / "token_bytes.npy", mmap_mode="r"))


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

    A byte-level token is spelt with one character for each of its bytes.
    """
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int64)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token in special else len(token)
    return lengths
