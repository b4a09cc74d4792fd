"""What the stages of serving read and write, for a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flows.artifact import Artifact, Stage, _seal, load_artifact
from flows.config.serving import EntryConfig, ExportConfig, PassportConfig, PublishConfig, VerifyConfig
from flows.serving import entry, publish
from flows.serving.proof import verify_stage
from tests.serving import tiny_model

NAME = "tiny"
EXPORT = ExportConfig(max_batch_size=3, max_new_tokens=30, threads=1, prefill_tokens=8, max_running=3)
ENTRY = EntryConfig(model_name=NAME, keep_versions=2, sequence_length=tiny_model.SEQUENCE_LENGTH, export=EXPORT)
PASSPORT = PassportConfig(
    model_name=NAME,
    sequence_length=tiny_model.SEQUENCE_LENGTH,
    seed=0,
    export=EXPORT,
    verify=VerifyConfig(lengths=(1, 2, 17), real_inputs=4, text_prompts=3, text_new_tokens=8),
)


@dataclass(frozen=True)
class Chain:
    """Artifacts of one candidate, from tokenizer to entry."""

    tokens: Artifact
    tokenizer: Artifact
    model: Artifact
    program: Artifact
    generation: Artifact
    entry: Artifact

    @property
    def made_from(self) -> Mapping[str, Artifact]:
        return {"program": self.program, "generation": self.generation}

    @property
    def passport_parents(self) -> Mapping[str, Artifact]:
        return {role: getattr(self, role) for role in ("tokens", "tokenizer", "model", "program", "entry")}


def build_entry(directory: Path, made_from: Mapping[str, Artifact], config: EntryConfig = ENTRY) -> Artifact:
    directory.mkdir(parents=True)
    entry.build(directory, config, made_from)
    return tiny_model.artifact("entry", directory)


def build_chain(root: Path, seed: int) -> Chain:
    artifact = tiny_model.artifact
    tokenizer = tiny_model.make_tokenizer(root / "tokenizer")
    checkpoint = tiny_model.make_checkpoint(root / "model", tokenizer, seed)
    program = artifact("program", tiny_model.make_program(root / "program", checkpoint))
    generation = artifact("generation", tiny_model.make_generation(root / "generation", checkpoint))
    return Chain(
        tokens=artifact("tokens", tiny_model.make_tokens(root / "tokens")),
        tokenizer=artifact("tokenizer", tokenizer),
        model=artifact("model", checkpoint),
        program=program,
        generation=generation,
        entry=build_entry(root / "entry", {"program": program, "generation": generation}),
    )


def make_passport(directory: Path, chain: Chain) -> Artifact:
    directory.mkdir(parents=True)
    metrics = verify_stage.build(directory, PASSPORT, chain.passport_parents)
    return replace(tiny_model.artifact("passport", directory), metrics=metrics)


@dataclass(frozen=True)
class Published:
    """Version 1 in a model repository, and the store that it came from."""

    repository: Path
    artifacts: Path

    @property
    def store(self) -> Path:
        return self.artifacts / "store"

    def copy(self, target: Path) -> Path:
        return Path(shutil.copytree(self.repository, target))


def publish_chain(root: Path, chain: Chain) -> Published:
    store = root / "artifacts" / "store"
    stored = store_chain(store, chain)
    passport = _store(store, make_passport(root / "passport", stored), stored.passport_parents)
    parents = {"entry": stored.entry, "passport": passport, "gates": stored.program}
    (root / "record").mkdir()
    publish.build(root / "record", PublishConfig(model_name=NAME, model_repo=root / "repo"), parents)
    return Published(root / "repo", root / "artifacts")


def store_chain(store: Path, chain: Chain) -> Chain:
    """The chain as its stages would have left it in an artifact store, with a passport and all manifests."""
    raw = store.parent / "raw"
    raw.mkdir(parents=True)
    (raw / "documents.txt").write_text("def\n")
    corpus = _store(store, tiny_model.artifact("corpus", raw), {})
    tokenizer = _store(store, chain.tokenizer, {"corpus": corpus})
    tokens = _store(store, chain.tokens, {"corpus": corpus, "tokenizer": tokenizer})
    model = _store(store, chain.model, {"tokens": tokens, "tokenizer": tokenizer})
    program = _store(store, chain.program, {"model": model})
    generation = _store(store, chain.generation, {"model": model})
    entry = _store(store, chain.entry, {"program": program, "generation": generation})
    return Chain(tokens, tokenizer, model, program, generation, entry)


def _store(store: Path, made: Artifact, parents: Mapping[str, Artifact]) -> Artifact:
    place = store / made.key
    shutil.copytree(made.path, place)
    _seal(place, Stage(made.stage, "flows.artifact", None, parents), made.key, made.metrics, 0)
    return load_artifact(place)
