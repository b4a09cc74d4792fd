"""Stage `entry`: one candidate's program as a model repository entry, complete in itself and not yet published.

`repo/<name>` turns token ids into scores, `repo/<name>_text` text into text. Their version directories carry all that
they need and import nothing of the project. `files.json` in each lists the sha256 of the others; the models check it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.artifact import Artifact, digest_file, digest_json, write_json_atomically
from flows.config.checks import require
from flows.config.serving import EntryConfig
from flows.data.tokenizer import CHAT_TEMPLATE_FILE, chat_template, end_of_text
from flows.export.shipped.encryption import encrypt, key_digest
from flows.serving.repository import model_names

REPOSITORY = "repo"
STAGED_VERSION = "1"
FILES = "files.json"
SHIPPED = Path(__file__).parents[1] / "export" / "shipped"
SCORES_SOURCES = (
    *("digests.py", "encryption.py", "layers.py", "messages.py", "onnx_session.py", "pipeline.py"),
    "rank.py",
)
TEXT_SOURCES = (
    *SCORES_SOURCES,
    "continuous_batching.py",
    "given_text.py",
    "pages.py",
    "responses.py",
    "sampling.py",
    "text_programs.py",
)
LIBRARY = "tokenizers.abi3.so"


def fingerprint(config: EntryConfig) -> str:
    """Digest of what is copied into every version from outside the store: model sources and the tokenizer library."""
    sources = {path.name: digest_file(path) for path in SHIPPED.glob("*.py")}
    key = {"key": key_digest()} if config.export.encrypt_weights else {}
    return digest_json({**sources, LIBRARY: digest_file(tokenizer_library()), **key})


def build(directory: Path, config: EntryConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes the repository entry of a candidate.

    Args:
        directory: Where it goes.
        config: Name and limits.
        parents: `program`, and `generation` where there is one; else texts are computed from their beginning.

    Raises:
        ConfigError: The memory for keys and values does not hold one text.
        ProgramError: The program's graph has other inputs or outputs than the served models need.
    """
    from flows.export.generation import GENERATION  # these import torch, which a stage that is skipped does not need
    from flows.export.runtime import PROGRAM
    from flows.serving import config_pbtxt

    program = parents["program"].path
    stages = config.export.pipeline_stages
    inputs, outputs = config_pbtxt.read_graph(program_files(program / PROGRAM, stages))
    scores, text = (directory / REPOSITORY / name for name in model_names(config.model_name))

    version = scores / STAGED_VERSION
    version.mkdir(parents=True)
    for path in program_files(program / PROGRAM, stages):
        shutil.copy(path, version)
    _copy_sources(version, "scores.py", SCORES_SOURCES)
    settings = {
        "sequence_length": config.sequence_length,
        "threads": config.export.threads,
        "pipeline_stages": stages,
    }
    _encrypt(version, config)
    _seal(version, settings)
    (scores / "configs").mkdir()
    for path, embedded in (
        (scores / "config.pbtxt", config_pbtxt.needs_our_model(config.export)),
        (scores / "configs" / "embedded.pbtxt", True),
    ):
        message = config_pbtxt.scores_config(config, inputs, outputs, embedded=embedded)
        path.write_text(config_pbtxt.to_text(message))
    (scores / "warmup").mkdir()
    ones = (1).to_bytes(8, "little") * config_pbtxt.WARMUP_TOKENS * config.export.max_batch_size
    (scores / "warmup" / f"ones_{config_pbtxt.WARMUP_TOKENS}").write_bytes(ones)

    version = text / STAGED_VERSION
    version.mkdir(parents=True)
    shutil.copy(program / "tokenizer.json", version)
    shutil.copy(tokenizer_library(), version / LIBRARY)
    (version / CHAT_TEMPLATE_FILE).write_text(chat_template(program))
    _copy_sources(version, "text.py", TEXT_SOURCES)
    if "generation" in parents:
        parts = program_files(parents["generation"].path / GENERATION, stages)
        for path in parts:
            shutil.copy(path, version)
        num_layers = _check_cache(parts, config)
    else:
        shutil.copy(program / PROGRAM, version)
        num_layers = 0
    export, longest = config.export, min(config.export.max_new_tokens, config.sequence_length)
    text_settings = {
        "sequence_length": config.sequence_length,
        "max_new_tokens": longest,
        "end_of_text": end_of_text(program),
        "default_max_tokens": min(longest, max(1, config.sequence_length // 4)),
        "threads": export.threads,
        "pipeline_stages": stages,
        "cache_bytes": export.cache_mb * 10**6,
        "num_layers": num_layers,
        # computing half a prompt saves nothing where the whole is computed again
        "prefill_tokens": export.prefill_tokens if "generation" in parents else config.sequence_length,
        "max_running": export.max_running,
        "max_waiting": export.max_waiting,
        "pooling": export.pooling,
    }
    _encrypt(version, config)
    _seal(version, text_settings | {"platform": platform.machine()})
    (text / "config.pbtxt").write_text(config_pbtxt.to_text(config_pbtxt.text_config(config)))
    return {
        "vocab_size": outputs[0].dims[0],
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
    }


def program_files(program: Path, stages: int) -> list[Path]:
    """Files of a program, whole or in parts.

    Args:
        program: The file that it has if it is whole.
        stages: Parts that it was made in.
    """
    from flows.export.shipped.pipeline import part_path

    return [part_path(program, number) for number in range(stages)] if stages > 1 else [program]


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


def _copy_sources(version: Path, model: str, others: Sequence[str]) -> None:
    shutil.copyfile(SHIPPED / model, version / "model.py")
    for name in others:
        shutil.copyfile(SHIPPED / name, version / name)


def _check_cache(parts: Sequence[Path], config: EntryConfig) -> int:
    """How many layers the parts of a program have."""
    import onnx

    from flows.export.generation import PAGE_TOKENS

    graphs = [onnx.load(part, load_external_data=False).graph for part in parts]
    pages = [one for graph in graphs for one in graph.input if "_pages_" in one.name]
    token_bytes = sum(
        onnx.helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type).itemsize
        * math.prod(dim.dim_value for dim in one.type.tensor_type.shape.dim[2:])
        for one in pages
    )
    tokens = -(-config.sequence_length // PAGE_TOKENS) * PAGE_TOKENS
    require(
        config.export.cache_mb * 10**6 >= tokens * token_bytes,
        "export.cache_mb",
        config.export.cache_mb,
        f"does not hold one text of {tokens} tokens x {token_bytes} bytes",
        f"Set export.cache_mb={-(-8 * tokens * token_bytes // 10**6)} or more.",
    )
    return sum(one.name.startswith("key_pages_") for one in pages)


def _encrypt(version: Path, config: EntryConfig) -> None:
    if config.export.encrypt_weights:
        for program in version.glob("*.onnx"):
            encrypt(program)


def _seal(version: Path, settings: Mapping[str, Any]) -> None:
    write_json_atomically(version / "settings.json", settings)
    write_json_atomically(version / FILES, {path.name: digest_file(path) for path in sorted(version.iterdir())})
