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

FIELD = "data.tokenizer.directory"
UNSAID = {"version", "padding", "truncation"}
"""Parts of tokenizer.json that do not decide which token stands for what."""


def check_tokenizer(directory: Path) -> tuple[Tokenizer, int, str]:
    """The tokenizer in a model directory, the model's vocabulary size, and the token that ends a document.

    Raises:
        ConfigError: A file is missing or broken, or the tokenizer is not byte-level: its tokens are no bytes of text.
    """
    tokenizer_path, config_path = directory / "tokenizer.json", directory / "config.json"
    for path in (tokenizer_path, config_path):
        if not path.exists():
            raise ConfigError(f"{FIELD}={directory} has no {path.name}. Name a Hugging Face model directory with one.")
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        decoder = json.dumps(json.loads(tokenizer_path.read_text()).get("decoder"))
        config = json.loads(config_path.read_text())
        ends = config.get("eos_token_id")
        end_id = ends[0] if isinstance(ends, list) else ends
        vocab_size = int(config["vocab_size"])
    except Exception as error:  # the tokenizers library raises nothing finer
        raise ConfigError(f"{FIELD}={directory} cannot be read: {error!r}. Copy the model again.") from error
    if '"ByteLevel"' not in decoder:
        raise ConfigError(
            f"{FIELD}={directory} has a tokenizer that is not byte-level BPE (its decoder is {decoder[:60]}): what its "
            f"tokens stand for cannot be counted in bytes. Choose a model of the kind of GPT-2, Llama 3 or Qwen."
        )
    end = None if end_id is None else tokenizer.id_to_token(end_id)
    if end is None:
        raise ConfigError(
            f"{FIELD}={directory} has eos_token_id={end_id} in config.json, no token that could end a document. "
            f"Set eos_token_id there to the id of such a token."
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


def adopt_tokenizer(source: Path, directory: Path) -> Mapping[str, Any]:
    """Copies tokenizer.json and a chat template, and writes what describes them; the stage's metrics.

    `token_bytes.npy` and `tokenizer_config.json` are written as for a tokenizer that is trained here.
    The vocabulary is as large as the model's, which may have more rows than the tokenizer has tokens.
    """
    tokenizer, vocab_size, end = check_tokenizer(source)
    shutil.copy(source / "tokenizer.json", directory)
    if (source / "chat_template.jinja").exists():
        shutil.copy(source / "chat_template.jinja", directory)
    theirs = source / "tokenizer_config.json"
    described = json.loads(theirs.read_text()) if theirs.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json_atomically(directory / "tokenizer_config.json", {**described, "eos_token": end})
    lengths = np.zeros(vocab_size, np.int64)
    added = tokenizer.get_added_tokens_decoder()
    for token, index in tokenizer.get_vocab().items():
        if index in added:  # spelt as it is; special ones stand for no text
            lengths[index] = 0 if added[index].special else len(token.encode())
        else:  # spelt with one character for each byte
            lengths[index] = len(token)
    np.save(directory / "token_bytes.npy", lengths)
    return {
        "vocab_size": vocab_size,
        "requested_vocab_size": vocab_size,
        "longest_token_bytes": int(lengths.max()),
    }
