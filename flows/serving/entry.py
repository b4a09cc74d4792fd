"""Stage `entry`: one candidate's program as a model repository entry, complete in itself and not yet published.

`repo/<name>` turns token ids into scores, `repo/<name>_text` text into text. Their version directories carry all that
they need and import nothing of the project. `files.json` in each lists the sha256 of the others; the models check it.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.artifact import Artifact, digest_file, digest_json, write_json_atomically
from flows.config.serving import EntryConfig

REPOSITORY = "repo"
STAGED_VERSION = "1"
FILES = "files.json"
MODEL_SOURCES = Path(__file__).parent / "models"
SESSION_SOURCE = Path(__file__).parents[1] / "export" / "onnx_session.py"
LIBRARY = "tokenizers.abi3.so"


def fingerprint(config: EntryConfig) -> str:
    """Digest of what is copied into every version from outside the store: model sources and the tokenizer library."""
    sources = {path.name: digest_file(path) for path in (*MODEL_SOURCES.glob("*.py"), SESSION_SOURCE)}
    return digest_json({**sources, LIBRARY: digest_file(tokenizer_library())})


def build(directory: Path, config: EntryConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes the repository entry of `parents["program"]`.

    Raises:
        ProgramError: The program's graph has other inputs or outputs than the served models need.
    """
    from flows.serving import config_pbtxt

    program = parents["program"].path
    inputs, outputs = config_pbtxt.read_graph(program / "model.onnx")
    scores = directory / REPOSITORY / config.model_name
    text = directory / REPOSITORY / f"{config.model_name}_text"

    version = scores / STAGED_VERSION
    version.mkdir(parents=True)
    shutil.copy(program / "model.onnx", version)
    _copy_sources(version, {"scores.py": "model.py", "digests.py": "digests.py"})
    shutil.copyfile(SESSION_SOURCE, version / SESSION_SOURCE.name)
    settings = {"sequence_length": config.sequence_length, "threads": config.export.threads}
    _seal(version, settings)
    (scores / "configs").mkdir()
    for path, embedded in ((scores / "config.pbtxt", False), (scores / "configs" / "embedded.pbtxt", True)):
        message = config_pbtxt.scores_config(config, inputs, outputs, embedded=embedded)
        path.write_text(config_pbtxt.to_text(message))
    (scores / "warmup").mkdir()
    ones = (1).to_bytes(8, "little") * config_pbtxt.WARMUP_TOKENS * config.export.max_batch_size
    (scores / "warmup" / f"ones_{config_pbtxt.WARMUP_TOKENS}").write_bytes(ones)

    version = text / STAGED_VERSION
    version.mkdir(parents=True)
    shutil.copy(program / "tokenizer.json", version)
    shutil.copy(tokenizer_library(), version / LIBRARY)
    _copy_sources(version, {"text.py": "model.py", "sampling.py": "sampling.py", "digests.py": "digests.py"})
    settings = {
        "sequence_length": config.sequence_length,
        "max_new_tokens": config.export.max_new_tokens,
        "default_max_tokens": min(config.export.max_new_tokens, max(1, config.sequence_length // 4)),
    }
    _seal(version, settings | {"platform": platform.machine()})
    (text / "config.pbtxt").write_text(config_pbtxt.to_text(config_pbtxt.text_config(config)))
    return {
        "vocab_size": outputs[0].dims[0],
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
    }


def version_digests(version_dir: Path) -> dict[str, str]:
    """sha256 of every file of a version directory as it is on disk, what the server itself put there left out.

    Args:
        version_dir: `<repository>/<model>/<version>`.
    """
    names = [FILES, *read_files(version_dir)]
    return {name: digest_file(version_dir / name) if (version_dir / name).is_file() else "missing" for name in names}


def read_files(version_dir: Path) -> dict[str, str]:
    """What a version's `files.json` says: sha256 by file name; empty if it has none that can be read."""
    try:
        listed: dict[str, str] = json.loads((version_dir / FILES).read_text())
    except (OSError, ValueError):
        return {}
    return listed


def tokenizer_library() -> Path:
    """The compiled `tokenizers` library of this environment; any CPython from 3.10 on can load it (stable ABI)."""
    return Path(str(importlib.metadata.distribution("tokenizers").locate_file(f"tokenizers/{LIBRARY}")))


def _copy_sources(version: Path, names: Mapping[str, str]) -> None:
    for source, target in names.items():
        shutil.copyfile(MODEL_SOURCES / source, version / target)


def _seal(version: Path, settings: Mapping[str, Any]) -> None:
    write_json_atomically(version / "settings.json", settings)
    write_json_atomically(version / FILES, {path.name: digest_file(path) for path in sorted(version.iterdir())})
