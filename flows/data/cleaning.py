"""What makes a raw document usable text, and the reasons for which one is dropped."""

from __future__ import annotations

import re
import unicodedata
from enum import StrEnum

from flows.config.data import CorpusConfig, Format, UnicodeForm

NEWLINES = re.compile(r"\r\n?")
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Dropped(StrEnum):
    """Why a document is left out; every one is counted and reported."""

    duplicate = "duplicate"
    empty = "empty"
    too_short = "too short"
    binary = "binary"
    bad_utf8 = "bad UTF-8"
    broken_json = "broken json line"
    missing_field = "missing field"
    not_a_conversation = "not a conversation"
    no_answer = "no answer by the assistant"
    missing_label = "missing label"
    unknown_label = "unknown label"


def cleaned(text: str, unicode_form: UnicodeForm) -> str:
    r"""The text with `\n` line ends, no other control characters but `\t`, and in the Unicode normal form."""
    text = CONTROL_CHARACTERS.sub("", NEWLINES.sub("\n", text))
    if unicode_form == UnicodeForm.none:
        return text
    return unicodedata.normalize("NFC" if unicode_form == UnicodeForm.NFC else "NFKC", text)


def usable_text(content: bytes | str, config: CorpusConfig) -> str | Dropped:
    """The cleaned text of a raw document, or the reason why there is none.

    A byte order mark is removed. NUL marks a binary document; white space alone is an empty one. A lone surrogate,
    which a JSON string can spell, has no UTF-8 form. Records that hold more than a text were cleaned when they were
    read.
    """
    if config.format != Format.text and isinstance(content, str):
        return content
    try:
        if isinstance(content, bytes):
            if b"\0" in content:
                return Dropped.binary
            content = content.decode("utf-8-sig")
        elif "\0" in content:
            return Dropped.binary
        text = cleaned(content, config.unicode_form)
        size = len(text.encode())
    except UnicodeError:
        return Dropped.bad_utf8
    if not text.strip():
        return Dropped.empty
    return text if size >= config.min_document_bytes else Dropped.too_short
