"""Sections of the configuration as plain values and as JSON, and back with every check."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from flows.config.checks import ConfigError

Section = TypeVar("Section")
HOMES = {
    r"distill\.train": "train",
    r"distill\.student": "model",
    r"data\.mixture\.[^.]+\.corpus": "data.corpus",
}
"""Places that hold a section of another one's kind, as patterns, and the name by which its own checks speak of it."""


def to_plain(section: Any) -> Any:
    """The section as JSON-ready values (dict, list, str, number, None)."""
    return TypeAdapter(type(section)).dump_python(section, mode="json")


def flat_settings(section: Any) -> dict[str, Any]:
    """The section as dotted names and JSON-ready values."""

    def walk(plain: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in plain.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(to_plain(section), ""))


def to_json(section: Any) -> str:
    """The section as indented JSON, keys in the order of the schema."""
    return json.dumps(to_plain(section), indent=2) + "\n"


def from_json(section_type: type[Section], text: str) -> Section:
    """The section that `to_json` wrote; every check runs again.

    Raises:
        pydantic.ValidationError: A field is missing or of the wrong type.
        ConfigError: A field is unknown.
    """
    section = TypeAdapter(section_type).validate_json(text)
    for name in unknown_settings(json.loads(text), section):
        raise ConfigError(f"{name} is not a field of {section_type.__name__}. Remove it.")
    return section


def unknown_settings(given: Any, section: Any) -> list[str]:
    """Dotted names among plain values that the section made of them does not have: nothing reads them."""
    return list(_unknown(given, to_plain(section), ""))


def _unknown(given: Any, known: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(known, dict):
        for name, value in given.items():
            if name not in known:
                yield f"{path}{name}"
            else:
                yield from _unknown(value, known[name], f"{path}{name}.")
    elif isinstance(given, list) and isinstance(known, list):
        for number, (value, other) in enumerate(zip(given, known, strict=False)):
            yield from _unknown(value, other, f"{path}{number}.")


def from_plain(section_type: type[Section], plain: Any, place: str = "") -> Section:
    """The section of plain values, e.g. as composed; every check runs.

    Args:
        section_type: What is made.
        plain: Its values, nested by name.
        place: Where the section stands in the configuration, for messages; empty = it is the whole.

    Raises:
        ConfigError: A type, a value or a combination is wrong; the message names field, value, rule, remedy.
    """
    try:
        return TypeAdapter(section_type).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in (place, *first["loc"]) if part)
        if isinstance(refusal := first.get("ctx", {}).get("error"), ConfigError):
            raise spoken_at(refusal, field) from None
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"{field} is not a setting. Leave it out, or see --help for those that are.") from None
        raise ConfigError(f"{field}={first['input']}: {first['msg']}. See --help for its type and meaning.") from None


def spoken_at(refusal: ConfigError, place: str) -> ConfigError:
    """The refusal with fields named as the user types them, where a section stands in another place than usual.

    Args:
        refusal: What a check of the section has said; it knows the usual place only.
        place: Where the section stands.
    """
    for pattern, home in HOMES.items():
        if there := re.match(pattern, place):
            return ConfigError(_renamed(str(refusal), home, there[0]))
    return refusal


def _renamed(message: str, section: str, place: str) -> str:
    return re.sub(rf"(?<![\w.]){re.escape(section)}\.(?=[a-z])", f"{place}.", message)


def with_settings(section: Section, settings: Mapping[str, Any], home: str, place: str) -> Section:
    """The section with some of its settings replaced; every check runs again.

    Args:
        section: What is changed.
        settings: Nested by name, e.g. {"train": {"max_steps": 200}}.
        home: Where the section stands in the configuration.
        place: Where the settings stand there, for messages.

    Raises:
        ConfigError: A setting is unknown, or its value is wrong.
    """
    plain = to_plain(section)
    _replace(plain, settings, place)
    try:
        return from_plain(type(section), plain, home)
    except ConfigError as refusal:
        raise ConfigError(_renamed(str(refusal), home, place)) from None


def _replace(plain: dict[str, Any], settings: Mapping[str, Any], place: str) -> None:
    for name, value in settings.items():
        if name not in plain:
            raise ConfigError(f"{place}.{name} is not a setting. Settings there: {', '.join(plain)}.")
        if isinstance(plain[name], dict) and isinstance(value, Mapping):
            _replace(plain[name], value, f"{place}.{name}")
        else:
            plain[name] = value
