"""The search on made-up machines, and one real tuning of a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.config import ConfigError
from flows.config.serving import EntryConfig
from flows.config.tuning import TuneConfig, TuneLatency, TuneTask
from flows.report.tuning_plot import draw_trials
from flows.serving import tuning
from flows.serving.tuning import Trial, is_better, tune
from tests.serving.tiny_chain import ENTRY, Chain

SCORES = TuneConfig(task=TuneTask.scores, latency=TuneLatency.whole, prompt_tokens=4, target_p95_ms=10)
START = replace(ENTRY, export=replace(ENTRY.export, max_batch_size=4, instances=1, threads=1))


class Machine:
    """Serves more with larger batches and waits longer for it; best at 16 x 2, where the target still holds."""

    def __init__(self) -> None:
        self.tried: list[dict[str, int]] = []

    def measure(self, config: TuneConfig, entry: EntryConfig, settings: dict[str, int], *_: object) -> Trial:
        export = entry.export
        assert settings["max_batch_size"] == export.max_batch_size
        self.tried.append(settings)
        if export.instances == 4:
            raise ConfigError("export.instances=4 does not fit this machine")
        p95 = 0.5 * export.max_batch_size + abs(export.instances - 2) + export.max_queue_delay_us / 1e3
        per_s = 100 * export.max_batch_size / (1 + 0.01 * export.max_queue_delay_us) * (1 + (export.instances == 2))
        return Trial(settings, p95 / 2, p95, per_s, 100)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(tuning, "_measure", made.measure)
    return made


def run(chain: Chain, directory: Path, config: TuneConfig = SCORES) -> tuning.Tuned:
    return tune(config, START, chain.made_from, chain.tokens, directory)


def test_the_best_settings_within_the_target_are_found(machine: Machine, chain: Chain, tmp_path: Path) -> None:
    tuned = run(chain, tmp_path)
    assert tuned.complete
    assert tuned.best.settings == {"max_batch_size": 16, "instances": 2, "max_queue_delay_us": 0, "threads": 1}
    assert tuned.best.p95_ms <= SCORES.target_p95_ms
    impossible = [trial for trial in tuned.trials if trial.impossible]
    assert impossible
    assert all("does not fit" in str(trial.impossible) for trial in impossible)
    draw_trials(tuned.trials, tuned.best, SCORES, tmp_path / "trials.svg")
    assert "max_batch_size=16" in (tmp_path / "trials.svg").read_text()


def test_what_was_tried_is_not_tried_again(machine: Machine, chain: Chain, tmp_path: Path) -> None:
    late = run(chain, tmp_path, replace(SCORES, minutes=1e-9))
    assert (late.complete, len(machine.tried)) == (False, 1)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"conditions": "cut sho')  # what a kill leaves
    (tmp_path / "trials.jsonl").write_text((tmp_path / "trials.jsonl").read_text() + "\n")
    first = run(chain, tmp_path)
    tried = len(machine.tried)
    assert len({json.dumps(one) for one in machine.tried}) == tried
    assert run(chain, tmp_path).best == first.best
    assert run(chain, tmp_path, replace(SCORES, target_p95_ms=5)).best.p95_ms <= 5, "the target is judged afresh"
    tried = len(machine.tried)
    run(chain, tmp_path, replace(SCORES, clients=3))
    assert len(machine.tried) > tried, "other clients are other conditions"


@pytest.mark.parametrize(
    ("one", "other", "better"),
    [
        ({"p95_ms": 9, "per_s": 10}, {"p95_ms": 11, "per_s": 90}, True),
        ({"p95_ms": 9, "per_s": 102}, {"p95_ms": 3, "per_s": 100}, False),
        ({"p95_ms": 9, "per_s": 104}, {"p95_ms": 3, "per_s": 100}, True),
        ({"p95_ms": 12, "per_s": 1}, {"p95_ms": 20, "per_s": 9}, True),
        ({"impossible": "no"}, {"p95_ms": 20, "per_s": 9}, False),
    ],
)
def test_better_is_within_the_target_then_more(one: Mapping[str, Any], other: Mapping[str, Any], better: bool) -> None:
    assert is_better(Trial({}, **one), Trial({}, **other), 10) == better


def test_requests_that_do_not_fit_are_said(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune.prompt_tokens=9999 leaves no room .* Set tune.prompt_tokens="):
        run(chain, tmp_path, replace(SCORES, prompt_tokens=9999))
    with pytest.raises(ConfigError, match=r"tune.latency=first_token means nothing for tune.task=scores"):
        TuneConfig(task=TuneTask.scores, latency=TuneLatency.first_token)


@pytest.mark.server
@pytest.mark.exhaustive
@pytest.mark.parametrize("task", TuneTask)
def test_a_real_server_is_tuned(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: TuneTask) -> None:
    knob = {TuneTask.text: "max_running", TuneTask.scores: "max_batch_size"}[task]
    monkeypatch.setitem(tuning.LADDERS, task, {knob: (1, 4)})
    config = TuneConfig(task=task, latency=TuneLatency.whole, clients=4, prompt_tokens=4, new_tokens=8, trial_s=1)
    tuned = tune(config, ENTRY, chain.made_from, chain.tokens, tmp_path)
    assert tuned.complete
    assert {trial.settings[knob] for trial in tuned.trials} == {1, 3, 4}
    assert all(0 < trial.p50_ms <= trial.p95_ms and trial.per_s > 0 and trial.answers > 0 for trial in tuned.trials)
