"""How users are told what is wrong: field and value, the rule with its numbers, the remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence


class ConfigError(ValueError):
    """A mistake in the configuration, worded for its user; command lines print it without a traceback."""

    exit_code = 2


class RunError(RuntimeError):
    """A fault of a run, worded for its user; command lines print it without a traceback."""

    exit_code = 1


def require(holds: bool, field: str, value: object, rule: str, remedy: str) -> None:
    """Raises `ConfigError` unless the rule holds.

    Args:
        holds: Whether the value keeps the rule.
        field: Dotted name as typed on the command line, e.g. `train.micro_batch_size`.
        value: What the user gave.
        rule: What has to hold, with its numbers; reads on after "<field>=<value> ".
        remedy: What to set instead, as a sentence.
    """
    if not holds:
        raise ConfigError(f"{field}={value} {rule}. {remedy}")


def require_positive(section: str, values: object, fields: Sequence[str]) -> None:
    """Raises `ConfigError` for the first of `fields` that is not greater than zero."""
    for name in fields:
        value = getattr(values, name)
        remedy = f"Set {section}.{name}=1 or more." if isinstance(value, int) else f"Set {section}.{name} above 0."
        require(value > 0, f"{section}.{name}", value, "must be greater than 0", remedy)


def require_fraction(section: str, values: object, fields: Sequence[str]) -> None:
    """Raises `ConfigError` for the first of `fields` that lies outside [0, 1]."""
    for name in fields:
        value = getattr(values, name)
        require(
            0 <= value <= 1,
            f"{section}.{name}",
            value,
            "must lie between 0 and 1",
            f"Set {section}.{name} to a share such as 0.1.",
        )


def require_address(field: str, address: str, whose: str, remedy: str) -> None:
    """Raises `ConfigError` unless an address is host:port; arguments as for `require`, `whose` ends the rule."""
    written_so = re.fullmatch(r"[^\s/]+:\d{1,5}", address) is not None
    require(written_so, field, address or "''", f"must be host:port, {whose}", remedy)
