"""Numbers as a person reads them: three significant digits, with their unit."""

from __future__ import annotations

import math


def size(num_bytes: float) -> str:
    """A number of bytes in decimal units, e.g. `4.19 MB`."""
    return _scaled(num_bytes, ("bytes", "kB", "MB", "GB", "TB", "PB"))


def count(number: float) -> str:
    """A number of things, e.g. `1.26 M`; exact below ten thousand."""
    return f"{number:,.0f}" if abs(number) < 10_000 else _scaled(number, ("", "k", "M", "G", "T"))


def duration(seconds: float) -> str:
    """A time, e.g. `0.4 s`, `2 min 05 s`, `3 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "< 0.1 s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def significant(value: float, digits: int = 3) -> str:
    """A number with that many significant digits; powers of ten outside 1e-4 to 1e6.

    Zero, infinity and NaN are written as such.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e+")
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))  # of the rounded value: 9.999 is 10.0
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units:
        if abs(number) < 999.5 or unit == units[-1]:
            return f"{number:g} {unit}".strip() if unit == units[0] else f"{significant(number)} {unit}"
        number /= 1000
    raise AssertionError("units must not be empty")
