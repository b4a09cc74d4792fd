"""Texts with labels: how a record or a file becomes one, and how a text becomes the tokens that are classified."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from flows.config.data import CorpusConfig
from flows.data.cleaning import Dropped, usable_text


def labelled_of(record: Any, config: CorpusConfig) -> str | Dropped:
    """The record's text, cleaned, and its label, as JSON; or why there are none."""
    text = record.get(config.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str | bytes):
        return Dropped.missing_field
    usable = usable_text(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text, config)
    return usable if isinstance(usable, Dropped) else _with_label(usable, record.get(config.label_field), config)


def with_folder_label(name: str, text: str, config: CorpusConfig) -> str | Dropped:
    """A file's text with the first folder of its name as label, as JSON; or why there is none."""
    folder, inside, _ = name.partition("/")
    return _with_label(text, folder if inside else None, config)


def _with_label(text: str, label: Any, config: CorpusConfig) -> str | Dropped:
    if not isinstance(label, str | int) or label == "":
        return Dropped.missing_label
    if config.labels and str(label) not in config.labels:
        return Dropped.unknown_label
    try:
        str(label).encode()
    except UnicodeError:
        return Dropped.bad_utf8
    return json.dumps({"text": text, "label": str(label)}, ensure_ascii=False)


def text_and_label(labelled: str) -> tuple[str, str]:
    """The text, and its label's name."""
    document = json.loads(labelled)
    return str(document["text"]), str(document["label"])


def text_of(labelled: str) -> str:
    """The text."""
    return text_and_label(labelled)[0]


def label_of(labelled: str) -> str:
    """The label's name."""
    return text_and_label(labelled)[1]


def encode_to_classify(
    tokenizer: Tokenizer, texts: Sequence[str], end: int, max_tokens: int
) -> list[tuple[list[int], bool]]:
    """Token ids of each text, and whether it was cut, its beginning kept.

    Around it stand the special tokens that the tokenizer itself puts there, such as BERT's; where it puts none, the
    end-of-text token stands on both sides: encoders classify by what they make of the first token, decoders by the
    last.

    Args:
        tokenizer: Of this caller alone, since its truncation is set.
        texts: What is classified.
        end: End-of-text token.
        max_tokens: Longest result.
    """
    own = tokenizer.num_special_tokens_to_add(False) > 0
    tokenizer.enable_truncation(max_tokens if own else max_tokens - 2)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=True)
    return [(encoding.ids if own else [end, *encoding.ids, end], bool(encoding.overflowing)) for encoding in encodings]
