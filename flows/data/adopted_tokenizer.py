"""The tokenizer of a Hugging Face model, taken as it is: a model to be tuned knows no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from flows.artifact import write_json_atomically
from flows.config.checks import ConfigError
from flows.config.model import Family

FIELD = "data.tokenizer.directory"
UNSAID = {"version", "padding", "truncation"}
"""Parts of tokenizer.json that do not decide which token stands for what."""
DESCRIBED = "tokenizer_config.json"
CONTINUES, SPACE = "##", "\u2581"
"""How a token of WordPiece that goes on a word begins, and SentencePiece's sign for a space."""


def check_tokenizer(directory: Path, family: Family | None = None) -> tuple[Tokenizer, int, str]:
    """The tokenizer in a model directory, the model's vocabulary size, and the token that ends a document.

    Args:
        directory: Hugging Face directory.
        family: Of the model; None = whichever the tokenizer serves.

    Raises:
        ConfigError: A file is missing or broken, or the tokenizer is not byte-level, which texts that are generated
            need, or has no mask token, which masked models need.
    """
    tokenizer_path, config_path = directory / "tokenizer.json", directory / "config.json"
    for path in (tokenizer_path, config_path):
        if not path.exists():
            raise ConfigError(f"{FIELD}={directory} has no {path.name}. Name a Hugging Face model directory with one.")
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        decoder = json.dumps(json.loads(tokenizer_path.read_text()).get("decoder"))
        config = json.loads(config_path.read_text())
        mask = mask_token(directory)
        end = _end_of_text(tokenizer, directory, config)
        vocab_size = int(config["vocab_size"])
    except Exception as error:  # the tokenizers library raises nothing finer
        raise ConfigError(f"{FIELD}={directory} cannot be read: {error!r}. Copy the model again.") from error
    if '"ByteLevel"' not in decoder and (family == Family.causal_lm or mask is None):
        raise ConfigError(
            f"{FIELD}={directory} has a tokenizer that is not byte-level BPE (its decoder is {decoder[:60]}): what its "
            f"tokens stand for cannot be counted in bytes. Choose a model of the kind of GPT-2, Llama 3 or Qwen."
        )
    if family == Family.masked_lm and (mask is None or tokenizer.token_to_id(mask) is None):
        raise ConfigError(
            f"{FIELD}={directory} has no mask token: {DESCRIBED} says mask_token={mask}. "
            "Name a masked language model's directory with its tokenizer, or set model.family=causal_lm."
        )
    if end is None:
        raise ConfigError(
            f"{FIELD}={directory} has eos_token_id={config.get('eos_token_id')} in config.json, no token that could "
            f"end a document. Set eos_token_id there to the id of such a token."
        )
    return tokenizer, vocab_size, end


def check_tokens_of(weights: Path, directory: Path, section: str) -> None:
    """Raises `ConfigError` where initial weights carry another tokenizer than the run takes: ids would mean other text.

    Two files are the same tokenizer if they say the same, whatever their spacing; padding and truncation do not count.

    Args:
        weights: Hugging Face directory; one without tokenizer.json cannot be compared.
        directory: Whose tokenizer is taken.
        section: Where the weights stand in the configuration.
    """
    if not (weights / "tokenizer.json").exists():
        return
    theirs, taken = (json.loads((one / "tokenizer.json").read_text()) for one in (weights, directory))
    differing = [part for part in sorted({*theirs, *taken} - UNSAID) if theirs.get(part) != taken.get(part)]
    if differing:
        raise ConfigError(
            f"{section}.initial_weights={weights} has another tokenizer than {FIELD}={directory}: they differ in "
            f"{', '.join(differing)}. A student and its teacher have to share one, since their scores are compared "
            f"token by token. Set {FIELD}={weights}, or {section}.initial_weights=null."
        )


def mask_token(directory: Path) -> str | None:
    """The token that a tokenizer's directory puts in the place of hidden ones; None = it has none."""
    return _named_token(directory, "mask_token")


def _named_token(directory: Path, role: str) -> str | None:
    path = directory / DESCRIBED
    token = json.loads(path.read_text()).get(role) if path.exists() else None
    return token["content"] if isinstance(token, dict) else token


def _end_of_text(tokenizer: Tokenizer, directory: Path, config: Mapping[str, Any]) -> str | None:
    """The model's end-of-text token; where config.json names none, what closes a masked model's text."""
    ends = config.get("eos_token_id")
    end_id = ends[0] if isinstance(ends, list) else ends
    if end_id is None and mask_token(directory) is not None:
        end_id = tokenizer.token_to_id(_named_token(directory, "sep_token") or "")
    return None if end_id is None else tokenizer.id_to_token(end_id)


def adopt_tokenizer(source: Path, directory: Path) -> Mapping[str, Any]:
    """Copies tokenizer.json and a chat template, and writes what describes them; the stage's metrics.

    `token_bytes.npy` and `tokenizer_config.json` are written as for a tokenizer that is trained here.
    The vocabulary is as large as the model's, which may have more rows than the tokenizer has tokens.
    """
    tokenizer, vocab_size, end = check_tokenizer(source)
    shutil.copy(source / "tokenizer.json", directory)
    if (source / "chat_template.jinja").exists():
        shutil.copy(source / "chat_template.jinja", directory)
    theirs = source / DESCRIBED
    described = json.loads(theirs.read_text()) if theirs.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json_atomically(directory / DESCRIBED, {**described, "eos_token": end})
    lengths = np.zeros(vocab_size, np.int64)
    added = tokenizer.get_added_tokens_decoder()
    byte_level = "ByteLevel" in repr(tokenizer.decoder)
    for token, index in tokenizer.get_vocab().items():
        if index in added:  # spelt as it is; special ones stand for no text
            lengths[index] = 0 if added[index].special else len(token.encode())
        elif byte_level:  # spelt with one character for each byte
            lengths[index] = len(token)
        else:
            lengths[index] = len(_spelt(token).encode())
    np.save(directory / "token_bytes.npy", lengths)
    return {
        "vocab_size": vocab_size,
        "requested_vocab_size": vocab_size,
        "longest_token_bytes": int(lengths.max()),
    }


def _spelt(token: str) -> str:
    """The text of a token that is spelt in characters: WordPiece's, whose spaces are lost, or SentencePiece's."""
    return token.removeprefix(CONTINUES).replace(SPACE, " ")
