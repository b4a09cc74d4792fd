"""The file of keys, one of which requests to the public endpoint must carry."""

from __future__ import annotations

import stat
from pathlib import Path

from flows.config.checks import require


def read_keys(path: Path) -> list[str]:
    """The keys of a file, one a line.

    Raises:
        ConfigError: Others may read the file, or it holds no key, or one that no header can carry.
    """
    name = "serve.api_keys_path"
    require(path.is_file(), name, path, "does not exist", "Write one key a line into it.")
    mode = stat.S_IMODE(path.stat().st_mode)
    require(mode & 0o077 == 0, name, path, f"has mode {mode:o}: others may read it", "chmod 600 it.")
    keys = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    require(bool(keys), name, path, "holds no key", "Write one key a line into it.")
    printable = all(key.isascii() and key.isprintable() for key in keys)
    require(printable, name, path, "holds a key that no header can carry", "Use letters, digits and signs of ASCII.")
    return keys
