"""A model repository of small files that are no models, with passports that prove them: for what only reads files."""

from __future__ import annotations

import json
from pathlib import Path

from flows.artifact import digest_file, write_json_atomically
from flows.serving.entry import FILES, read_files
from flows.serving.releases.state import record_published
from flows.serving.repository import PASSPORT, VERSION_CONFIG, lock_repository, model_names

NAME = "made_up"


def add_version(repository: Path, version: int, *, live: bool = True, name: str = NAME, recorded: bool = True) -> None:
    proven = {}
    for model in model_names(name):
        place = repository / model / str(version)
        (place / VERSION_CONFIG).mkdir(parents=True)
        (place / VERSION_CONFIG / "config.pbtxt").write_text(f'name: "{model}" # {version}')
        (place.parent / "config.pbtxt").write_text(f'name: "{model}"')
        (place / "model.py").write_text(f"VERSION = {version}")
        write_json_atomically(place / FILES, {"model.py": digest_file(place / "model.py")})
        proven[model] = read_files(place)
    passport = {"verdict": "passed", "digests": {"served_files": proven}, "seed": version}
    (repository / name / str(version) / PASSPORT).write_text(json.dumps(passport))
    if recorded:
        with lock_repository(repository):
            record_published(repository, name, version, live=live)
