from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.config.data import CorpusConfig, EncodeConfig, Source, TokenizerConfig

Chain = Callable[..., dict[str, Artifact]]


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[[Mapping[str, bytes | str]], Path]:
    def write(files: Mapping[str, bytes | str], folder: str = "raw") -> Path:
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / folder

    return write


@pytest.fixture
def write_json_lines(tmp_path: Path) -> Callable[[list[Any]], Path]:
    def write(records: list[Any], name: str = "raw.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def make_chain(
    root: Path,
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig | None = None,
    encode: EncodeConfig | None = None,
) -> dict[str, Artifact]:
    store = ArtifactStore(root)
    made = {"corpus": store.make(Stage("corpus", "flows.data.corpus", corpus))}
    made["tokenizer"] = store.make(
        Stage("tokenizer", "flows.data.tokenizer", tokenizer or TokenizerConfig(vocab_size=1024), dict(made))
    )
    made["tokens"] = store.make(Stage("tokens", "flows.data.encode", encode or EncodeConfig(), dict(made)))
    return made


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    def make(*sections: Any, folder: str = "artifacts") -> dict[str, Artifact]:
        return make_chain(tmp_path / folder, *sections)

    return make


@pytest.fixture(scope="session")
def email_config() -> CorpusConfig:
    """Thirty files of real text, 400 kB."""
    folder = Path(sysconfig.get_path("stdlib")) / "email"
    return CorpusConfig(source=Source.files, paths=(f"{folder}/**/*.py",), validation_fraction=0.1, test_fraction=0.1)


@pytest.fixture(scope="session")
def email_chain(email_config: CorpusConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The chain on that text, with shards so small that every split of size has several."""
    encode = EncodeConfig(shard_bytes=20_000, batch_bytes=50_000)
    return make_chain(tmp_path_factory.mktemp("email"), email_config, TokenizerConfig(vocab_size=1024), encode)
