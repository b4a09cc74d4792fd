"""Sections of the configuration as plain values and as JSON, and back with every check."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from flows.config.checks import ConfigError

Section = TypeVar("Section")


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
        pydantic.ValidationError: A field is missing, unknown or of the wrong type.
    """
    return TypeAdapter(section_type).validate_json(text)


def from_plain(section_type: type[Section], plain: Any) -> Section:
    """The section of plain values, e.g. as composed; every check runs.

    Raises:
        ConfigError: A type, a value or a combination is wrong; the message names field, value, rule, remedy.
    """
    try:
        return TypeAdapter(section_type).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(refusal := first.get("ctx", {}).get("error"), ConfigError):
            raise refusal from None
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{field}={first['input']}: {first['msg']}. See --help for its type and meaning.") from None


def with_settings(section: Section, settings: Mapping[str, Any], place: str) -> Section:
    """The section with some of its settings replaced; every check runs again.

    Args:
        section: What is changed.
        settings: Nested by name, e.g. {"train": {"max_steps": 200}}.
        place: Where the settings stand in the configuration, for messages.

    Raises:
        ConfigError: A setting is unknown, or its value is wrong.
    """
    plain = to_plain(section)
    _replace(plain, settings, place)
    return from_plain(type(section), plain)


def _replace(plain: dict[str, Any], settings: Mapping[str, Any], place: str) -> None:
    for name, value in settings.items():
        if name not in plain:
            raise ConfigError(f"{place}.{name} is not a setting. Settings there: {', '.join(plain)}.")
        if isinstance(plain[name], dict) and isinstance(value, Mapping):
            _replace(plain[name], value, f"{place}.{name}")
        else:
            plain[name] = value
