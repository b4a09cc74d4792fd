"""Which settings serve most within a waiting time: tried on a real server under load, one after the other.

Coordinate descent: from the settings as they are, each knob is moved a step up and a step down its ladder, and a move
that is clearly better is kept, until none is. Every trial is written down when it is over.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from flows.artifact import Artifact, digest_json
from flows.config import ConfigError, to_plain
from flows.config.serving import EntryConfig, ExportConfig
from flows.config.tuning import TuneConfig, TuneLatency, TuneTask
from flows.data.mixture import open_split
from flows.serving import entry
from flows.serving.client import Client, Transport
from flows.serving.installation import ServerError
from flows.serving.load import Load, Request, ask_text, under_load
from flows.serving.repository import model_names
from flows.serving.server import InferenceServer

LADDERS: dict[TuneTask, dict[str, tuple[int, ...]]] = {
    TuneTask.text: {"max_running": (4, 8, 16, 32, 64), "prefill_tokens": (32, 64, 128, 256, 512), "threads": (0, 1, 2)},
    TuneTask.scores: {
        "max_batch_size": (1, 2, 4, 8, 16, 32),
        "instances": (1, 2, 4),
        "max_queue_delay_us": (0, 250, 500, 1000, 2000, 5000),
        "threads": (0, 1, 2),
    },
}
"""Settings of `export` that are tried, and the values of each."""
CLEARLY = 1.03
"""A move counts as better from this ratio on: two trials of the same settings differ by a percent or two."""
NUM_PROMPTS = 64
TRIALS = "trials.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """Some settings and what they gave."""

    settings: dict[str, int]
    """The knobs, by name in `export`."""
    p50_ms: float = math.inf
    p95_ms: float = math.inf
    """Of the wait that the target is for."""
    per_s: float = 0.0
    """Tokens generated, or rows scored, in a second by all clients together."""
    answers: int = 0
    impossible: str | None = None
    """Why it could not be tried."""


@dataclass(frozen=True)
class Tuned:
    """What came of it."""

    start: Trial
    best: Trial
    trials: list[Trial]
    complete: bool
    """Whether no move was left to try; else the time was over."""


def tune(
    config: TuneConfig, entry_config: EntryConfig, parents: Mapping[str, Artifact], tokens: Artifact, directory: Path
) -> Tuned:
    """Finds settings; trials that `directory` holds from an earlier call are not repeated.

    Args:
        config: What to look for.
        entry_config: The entry as it would be published, where the search starts.
        parents: What the entry is made from: `program`, and `generation` where there is one.
        tokens: Encoded data, whose test split the requests are cut from.
        directory: Where trials are kept.

    Raises:
        ConfigError: The requests do not fit the model.
        ServerError: The settings that the search starts from cannot be served.
    """
    limit = entry_config.sequence_length - (config.new_tokens if config.task == TuneTask.text else 0)
    if config.prompt_tokens > limit:
        raise ConfigError(
            f"tune.prompt_tokens={config.prompt_tokens} leaves no room for tune.new_tokens={config.new_tokens} in "
            f"data.sequence_length={entry_config.sequence_length}. Set tune.prompt_tokens={max(1, limit)} or fewer."
        )
    prompts = _prompts(tokens.path, config.prompt_tokens)
    directory.mkdir(parents=True, exist_ok=True)
    conditions = digest_json(
        {
            "tune": {
                name: value for name, value in to_plain(config).items() if name not in ("minutes", "target_p95_ms")
            },
            "entry": to_plain(replace(entry_config, export=_with(entry_config.export, _middle(config.task)))),
            "parents": {role: parent.digest for role, parent in parents.items()},
            "tokens": tokens.digest,
        }
    )
    ladders = LADDERS[config.task]
    known = _read(directory / TRIALS, conditions)
    deadline = time.monotonic() + 60 * config.minutes

    def attempt(settings: dict[str, int]) -> Trial | None:
        """The trial of these settings, or None when the time is over."""
        found = next((trial for trial in known if trial.settings == settings), None)
        if found is not None:
            return found
        if known and time.monotonic() > deadline:
            return None
        export = _with(entry_config.export, settings)
        try:
            trial = _measure(config, replace(entry_config, export=export), settings, parents, prompts)
        except (ConfigError, ServerError) as error:
            if not known:
                raise
            trial = Trial(settings, impossible=str(error))
        known.append(trial)
        with (directory / TRIALS).open("a") as file:
            file.write(json.dumps({"conditions": conditions, **asdict(trial)}) + "\n")
        logger.info("%s", describe(trial, config))
        return trial

    start = attempt({name: getattr(entry_config.export, name) for name in ladders})
    assert start is not None, "a first trial is never late"
    best, complete = start, False
    while not complete:
        complete = True
        for settings in _moves(best.settings, ladders):
            trial = attempt(settings)
            if trial is None:
                return Tuned(start, best, known, complete=False)
            if is_better(trial, best, config.target_p95_ms):
                best, complete = trial, False
                break
    return Tuned(start, best, known, complete=True)


def is_better(trial: Trial, other: Trial, target_p95_ms: float) -> bool:
    """Whether a trial is clearly better: keeps the target, then serves more; where neither keeps it, waits less."""
    if trial.impossible or other.impossible:
        return not trial.impossible
    keeps, other_keeps = trial.p95_ms <= target_p95_ms, other.p95_ms <= target_p95_ms
    if keeps != other_keeps:
        return keeps
    if keeps:
        return trial.per_s > CLEARLY * other.per_s
    return trial.p95_ms * CLEARLY < other.p95_ms


def describe(trial: Trial, config: TuneConfig) -> str:
    """One line on a trial."""
    words = " ".join(f"export.{name}={value}" for name, value in trial.settings.items())
    if trial.impossible:
        return f"{words}: {trial.impossible}"
    unit = "tokens/s" if config.task == TuneTask.text else "rows/s"
    verdict = "within" if trial.p95_ms <= config.target_p95_ms else "above"
    return (
        f"{words}: {trial.per_s:.0f} {unit}, {config.latency.replace('_', ' ')} p50 {trial.p50_ms:.1f} ms, "
        f"p95 {trial.p95_ms:.1f} ms, {verdict} {config.target_p95_ms:g}"
    )


def _with(export: ExportConfig, settings: Mapping[str, Any]) -> ExportConfig:
    return replace(export, **settings)


def _middle(task: TuneTask) -> dict[str, int]:
    """Some value for each knob, so that where the search starts is no condition of a trial."""
    return {name: ladder[len(ladder) // 2] for name, ladder in LADDERS[task].items()}


def _moves(settings: dict[str, int], ladders: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Settings a step away."""
    for name, ladder in ladders.items():
        above = [value for value in ladder if value > settings[name]][:1]
        below = [value for value in ladder if value < settings[name]][-1:]
        for value in (*above, *below):
            yield {**settings, name: value}


def _read(path: Path, conditions: str) -> list[Trial]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [Trial(**row) for row in rows if row.pop("conditions") == conditions]


def _prompts(tokens: Path, length: int) -> list[NDArray[np.int64]]:
    """Token ids [L] spread over the test split."""
    dataset = open_split(tokens, "test", length)
    places = np.linspace(0, len(dataset) - 1, min(NUM_PROMPTS, len(dataset))).round().astype(int)
    return [dataset[int(place)][:length] for place in places]


def _measure(
    config: TuneConfig,
    entry_config: EntryConfig,
    settings: dict[str, int],
    parents: Mapping[str, Artifact],
    prompts: Sequence[NDArray[np.int64]],
) -> Trial:
    scores_model, text_model = model_names(entry_config.model_name)
    model = text_model if config.task == TuneTask.text else scores_model
    with tempfile.TemporaryDirectory(prefix="millrace-tune-") as scratch:
        entry.build(Path(scratch), entry_config, parents)
        with InferenceServer(Path(scratch) / entry.REPOSITORY, [model], Path(scratch) / "server.log") as server:
            ask_for = partial(_ask_for, server.grpc_address, config.clients)
            if config.task == TuneTask.text:
                tokenizer = Tokenizer.from_file(str(parents["program"].path / "tokenizer.json"))
                texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in prompts]
                ask_for = partial(ask_for, texts, _for_text(model, config.new_tokens))
            else:
                ask_for = partial(ask_for, prompts, _for_scores(model))
            ask_for(config.trial_s / 4)
            load = ask_for(config.trial_s)
    waits = {
        TuneLatency.first_token: load.first_ms,
        TuneLatency.between_tokens: load.between_ms,
        TuneLatency.whole: load.whole_ms,
    }[config.latency]
    p50, p95 = np.percentile(waits, [50, 95])
    per_s = load.tokens_per_s if config.task == TuneTask.text else load.answers_per_s
    return Trial(settings, round(float(p50), 3), round(float(p95), 3), round(per_s, 2), len(load.tokens))


def _ask_for(
    address: str,
    clients: int,
    requests: Sequence[Request],
    ask: Callable[[Client, Request, Load], object],
    seconds: float,
) -> Load:
    end = time.monotonic() + seconds

    def until_the_end() -> Iterator[Request]:
        for request in cycle(requests):
            if time.monotonic() > end:
                return
            yield request

    return under_load(clients, until_the_end(), lambda: Client(Transport.grpc, address), ask)


def _for_text(model: str, new_tokens: int) -> Callable[[Client, str, Load], object]:
    return lambda client, prompt, load: ask_text(client, model, prompt, new_tokens, load)


def _for_scores(model: str) -> Callable[[Client, NDArray[np.int64], Load], object]:
    def ask(client: Client, ids: NDArray[np.int64], load: Load) -> None:
        started = time.perf_counter()
        client.scores(model, ids[None], np.ones_like(ids[None]))
        load.whole_ms.append(1e3 * (time.perf_counter() - started))
        load.tokens.append(len(ids))

    return ask
