"""Answers to all rows of a file, from one server or several, in order, and never lost."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import tritonclient.utils  # has no types
from tqdm import tqdm

from flows.artifact import digest_file, write_json_atomically
from flows.config import ConfigError, RunError, to_plain
from flows.config.predict import PredictConfig
from flows.serving.client import Client, Transport
from flows.serving.prediction.row_files import Part, count_filled, count_rows, join_parts, read_parts
from flows.serving.prediction.server_team import RETRY_S, Answer, Row, ServerTeam

STATE = "predict.json"
"""What a run works with: kept among the parts while it goes on, and beside the output with what came of it."""
PARTS_AHEAD = 2
"""Parts being worked on at a time, so that servers need not wait for the slowest row of one."""
ELSEWHERE = ("input", "output", "servers", "replicas", "version", "requests_per_server", "patience_s")
"""Settings that may differ when a run goes on: they leave every answer as it is, or are kept apart."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What came of a run."""

    rows: int
    errors: int
    """Rows that have no answer but a reason."""
    version: int
    repeated_parts: int
    """Parts that an earlier, interrupted run had written."""


def parts_directory(output: Path) -> Path:
    """Where the parts of an output are kept while it is being made."""
    return output.with_name(f"{output.name}.parts")


def begun_version(config: PredictConfig) -> int:
    """Version with which an interrupted run began that would go on; 0 = there is none."""
    path = parts_directory(config.output) / STATE if config.output else None
    return int(json.loads(path.read_text())["version"]) if path is not None and path.exists() else 0


def predict(config: PredictConfig, text_model: str, addresses: Sequence[str], passport: str | None = None) -> Summary:
    """Writes `config.output`: each row of the input with the model's continuation of its text.

    Parts are written beside the output while it goes on, and the same call takes up an interrupted run from them. A row
    that cannot be answered keeps its place and says why. A server that is lost loses no row: the others get them.
    `<output>.predict.json` says in the end which version answered, what proves it, and digests of input and output.

    Args:
        config: What to read, ask and write.
        text_model: Served name of the text model.
        addresses: gRPC addresses of servers that serve it.
        passport: sha256 of the passport of the version that they serve; None = nobody here knows what they serve.

    Raises:
        ConfigError: There is no input, an output is there already, or an interrupted run had other settings.
        RunError: No server is left, or they have no version in common.
    """
    source, target = _paths(config)
    names = [config.output_field, *(f"{config.output_field}_{name}" for name in ("finish_reason", "tokens", "error"))]
    types = dict(zip(names, (pa.string(), pa.string(), pa.int32(), pa.string()), strict=True))
    parts = read_parts(source, config.field, names, config.rows_per_part)
    first = next(parts, None)  # mistakes are said before anything is written
    if first is None:
        raise ConfigError(f"predict.input={source} has no rows. Give a file with one at least.")
    total = count_rows(source)
    parts_dir = parts_directory(target)
    settings = {name: value for name, value in to_plain(config).items() if name not in ELSEWHERE}
    state = {"input_sha256": digest_file(source), "model": text_model, "passport": passport, "settings": settings}
    began_with = _take_up(parts_dir, state)
    version = _choose_version(addresses, text_model, began_with or config.version, config.patience_s)
    write_json_atomically(parts_dir / STATE, state | {"version": version})
    paths = [parts_dir / f"part-{number:06d}{target.suffix}" for number in range(-(-total // config.rows_per_part))]
    done = {number for number, path in enumerate(paths) if path.exists()}
    if done:
        logger.info("%d of %d parts are there from an earlier run", len(done), len(paths))
    team = ServerTeam(addresses, text_model, version, config)
    with tqdm(total=total, initial=min(total, len(done) * config.rows_per_part), unit="row", disable=None) as bar:
        waiting = (part for part in chain([first], parts) if part.number not in done)
        for part, answers in _answered(waiting, team, bar):
            rows = [_columns(answer) for answer in answers]
            columns = {name: [row[index] for row in rows] for index, name in enumerate(names)}
            part.write(paths[part.number], types, columns)
    join_parts(paths, target)
    errors = count_filled(target, names[-1])
    came_of_it = {"version": version, "rows": total, "errors": errors, "output_sha256": digest_file(target)}
    write_json_atomically(target.with_name(f"{target.name}.{STATE}"), state | came_of_it)
    shutil.rmtree(parts_dir)
    return Summary(total, errors, version, len(done))


def _paths(config: PredictConfig) -> tuple[Path, Path]:
    if config.input is None or config.output is None:
        raise ConfigError(
            "predict.input and predict.output must both be set. "
            "Type python -m flows.predict predict.input=prompts.jsonl predict.output=answers.jsonl."
        )
    if not config.input.is_file():
        raise ConfigError(f"predict.input={config.input} does not exist. Give the path of a .jsonl or .parquet file.")
    if config.output.exists():
        raise ConfigError(f"predict.output={config.output} exists already. Remove it, or name another.")
    if not config.output.absolute().parent.is_dir():
        raise ConfigError(f"predict.output={config.output} lies in no directory that exists. Make it first.")
    return config.input, config.output


def _take_up(parts_dir: Path, state: dict[str, Any]) -> int:
    """Version that an interrupted run began with; 0 = there is none to go on with."""
    path = parts_dir / STATE
    if not path.exists() or not [*parts_dir.glob("part-*")]:
        return 0
    before = json.loads(path.read_text())
    for name in ("input_sha256", "model", "passport"):
        known = [one[name] for one in (before, state) if one[name] is not None]
        if len(set(known)) > 1:
            raise ConfigError(
                f"predict.output: {parts_dir} is left from a run with another {name.removesuffix('_sha256')}. "
                "Remove that directory to begin again, or name another output."
            )
    for name, value in state["settings"].items():
        if before["settings"].get(name) != value:
            raise ConfigError(
                f"predict.{name}={value} was {before['settings'].get(name)} when {parts_dir} was begun. "
                "Set it back to go on, or remove that directory to begin again."
            )
    state["passport"] = state["passport"] and before["passport"]  # what answered the parts before, unless nobody knows
    return int(before["version"])


def _choose_version(addresses: Sequence[str], model: str, wanted: int, patience_s: float) -> int:
    """The version to ask of all servers: the one wanted, or for 0 the newest that all have."""
    common = set.intersection(*(_served_versions(address, model, patience_s) for address in addresses))
    if not common or (wanted and wanted not in common):
        missing = f"version {wanted}" if wanted else "a version in common"
        raise RunError(
            f"the servers at {', '.join(addresses)} do not all serve {missing} of {model}; all serve {sorted(common)}. "
            "Publish it to all of them, or remove the parts of the run that began with it."
        )
    return wanted or max(common)


def _served_versions(address: str, model: str, patience_s: float) -> set[int]:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with Client(Transport.grpc, address) as client:
                return set(client.versions(model))
        except tritonclient.utils.InferenceServerException as error:
            if "UNAVAILABLE" not in str(error.status()):
                raise ConfigError(
                    f"publish.model_name={model.removesuffix('_text')} is not served at {address}: {error.message()}. "
                    "Set the name that was published."
                ) from error
            if time.monotonic() > deadline:
                raise RunError(
                    f"predict.servers: {address} has not answered for predict.patience_s={patience_s:g}. Start it with "
                    "python -m flows.serve, or leave predict.servers out."
                ) from error
        time.sleep(RETRY_S)


def _answered(parts: Iterator[Part], team: ServerTeam, bar: tqdm[Any]) -> Iterator[tuple[Part, list[Answer]]]:
    """Parts with an answer for each row, as they become complete."""
    working: dict[int, tuple[Part, list[Answer | None]]] = {}
    missing: dict[int, int] = {}
    try:
        while True:
            while len(working) < PARTS_AHEAD and (part := next(parts, None)) is not None:
                answers: list[Answer | None] = [text if isinstance(text, RunError) else None for text in part.texts]
                working[part.number], missing[part.number] = (part, answers), len(answers)
                for index, text in enumerate(part.texts):
                    if isinstance(text, str):
                        team.ask(Row(part.number, index, text, part.first_row + index))
                    else:
                        missing[part.number] -= 1
                        bar.update()
            for number in [number for number in working if not missing[number]]:
                part, filled = working.pop(number)
                yield part, [answer for answer in filled if answer is not None]
            if not working:
                return
            if all(missing[number] for number in working):
                row, answer = team.answer()
                working[row.part][1][row.index] = answer
                missing[row.part] -= 1
                bar.update()
    finally:
        team.dismiss()


def _columns(answer: Answer) -> tuple[str | None, str | None, int | None, str | None]:
    if isinstance(answer, RunError):
        return None, None, None, str(answer)
    return answer.text, answer.finish_reason, answer.completion_tokens, None
