from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.config.data import CorpusConfig, UnicodeForm
from flows.data.cleaning import Dropped, cleaned, usable_text


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\r\nb\rc\n\td", "a\nb\nc\n\td"),
        ("form\x0cfeed \x1b[1mbold\x7f\x85", "formfeed [1mbold"),
        ("e\u0301 \ufb01", "\u00e9 \ufb01"),
        ("e\x02\u0301", "\u00e9"),  # control characters go first, or the result would not be normal
    ],
)
def test_newlines_control_characters_and_normal_form(raw: str, expected: str) -> None:
    assert cleaned(raw, UnicodeForm.NFC) == expected


def test_the_normal_form_is_the_configured_one() -> None:
    assert cleaned("e\u0301\ufb01", UnicodeForm.none) == "e\u0301\ufb01"
    assert cleaned("e\u0301\ufb01", UnicodeForm.NFKC) == "\u00e9fi"


@given(st.text(), st.sampled_from(UnicodeForm))
def test_cleaning_is_complete_and_idempotent(raw: str, form: UnicodeForm) -> None:
    text = cleaned(raw, form)
    assert cleaned(text, form) == text
    assert not [character for character in text if unicodedata.category(character) == "Cc" and character not in "\n\t"]
    assert form == UnicodeForm.none or unicodedata.is_normalized(form.value, text)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfmarked text", "marked text"),
        (b"text\0more", Dropped.binary),
        ("text\0more", Dropped.binary),
        (b"caf\xe9 au lait", Dropped.bad_utf8),
        ("lone \ud800 surrogate", Dropped.bad_utf8),
        (b"", Dropped.empty),
        (b" \n\t\x0c", Dropped.empty),
        (b"short", Dropped.too_short),
        ("\u00e9\u00e9\u00e9\u00e9\u00e9", "\u00e9\u00e9\u00e9\u00e9\u00e9"),  # ten bytes, five characters
    ],
)
def test_usable_text_or_the_reason(content: bytes | str, expected: str) -> None:
    result = usable_text(content, CorpusConfig(min_document_bytes=10))
    assert result == expected
    assert isinstance(result, Dropped) == isinstance(expected, Dropped)
