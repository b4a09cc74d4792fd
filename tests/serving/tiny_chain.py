"""What the stages of serving read and write, for a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flows.artifact import Artifact, Stage, _seal, load_artifact
from flows.config.serving import EntryConfig, ExportConfig, PassportConfig, VerifyConfig
from flows.serving import entry, verify
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
    metrics = verify.build(directory, PASSPORT, chain.passport_parents)
    return replace(tiny_model.artifact("passport", directory), metrics=metrics)


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


def store_passport(store: Path, chain: Chain) -> Artifact:
    return _store(store, make_passport(store.parent / "passport", chain), chain.passport_parents)


def _store(store: Path, made: Artifact, parents: Mapping[str, Artifact]) -> Artifact:
    place = store / made.key
    shutil.copytree(made.path, place)
    _seal(place, Stage(made.stage, "flows.artifact", None, parents), made.key, made.metrics, 0)
    return load_artifact(place)
