"""Finds the settings that serve most within a waiting time, by trying them on a real server under load.

    python -m flows.tune +experiment=quickstart                                  first tokens within half a second
    python -m flows.tune +experiment=quickstart tune.task=scores tune.latency=whole tune.target_p95_ms=20
    python -m flows.tune +experiment=quickstart tune.latency=between_tokens tune.clients=32 tune.minutes=30

It takes the words of a run that has published a version and tries that version's entry with other settings of `export`.
Interrupted or out of time, the same command goes on. Into `artifacts_dir/tune/<name>-<task>`: every trial, a plot, and
tuned.yaml with the settings and their evidence; the words to publish with are printed. Serve nothing else meanwhile.
"""

from __future__ import annotations

import logging
import sys

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.chain import look_along
from flows.compose import run_cli
from flows.config import Config, ConfigError
from flows.report.tuning_plot import draw_trials
from flows.serving.installation import check_server_available
from flows.serving.tuning import Tuned, describe
from flows.serving.tuning import tune as tune_entry


def tune(config: Config) -> None:
    """Tries, writes down, draws, and prints the words to publish with."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    check_server_available()
    parents, tokens = _made_before(config)
    directory = config.artifacts_dir / "tune" / f"{config.name}-{config.tune.task}"
    tuned = tune_entry(config.tune, config.entry(), parents, tokens, directory)
    (directory / "tuned.yaml").write_text(_as_yaml(tuned, config))
    draw_trials(tuned.trials, tuned.best, config.tune, directory / "trials.svg")
    print(f"\n{len(tuned.trials)} trials in {directory}" + ("" if tuned.complete else "; there are more to try."))
    print(f"as it was: {describe(tuned.start, config.tune)}\nbest:      {describe(tuned.best, config.tune)}")
    if tuned.best.p95_ms > config.tune.target_p95_ms:
        print(
            f"Nothing that was tried keeps tune.target_p95_ms={config.tune.target_p95_ms:g} with tune.clients="
            f"{config.tune.clients}. Allow more, or serve fewer clients at each server."
        )


def _made_before(config: Config) -> tuple[dict[str, Artifact], Artifact]:
    """What the entry is made from, and the tokens, as the run with these words left them."""
    store = ArtifactStore(config.artifacts_dir / "store")
    made: dict[str, Artifact] = {}
    parents: dict[str, Artifact] = {}

    def look(stage: Stage) -> Artifact | None:
        if stage.name == "entry":
            parents.update(stage.parents)
            return None
        found, reason = store.find(stage)
        if found is None:
            raise ConfigError(
                f"name={config.name} has no {stage.name} ({reason}). Run python -m flows.train with these words first."
            )
        made[stage.name] = found
        return found

    look_along(config, look)
    if not parents:
        raise ConfigError(
            f"name={config.name} chose no candidate: {made['gates'].metrics['choice']}. Nothing is served."
        )
    return parents, made["tokens"]


def _as_yaml(tuned: Tuned, config: Config) -> str:
    lines = [
        f"# {len(tuned.trials)} trials with tune.clients={config.tune.clients}, {config.tune.trial_s:g} s each",
        f"# as it was: {describe(tuned.start, config.tune)}",
        f"# best:      {describe(tuned.best, config.tune)}",
        "export:",
        *(f"  {name}: {value}" for name, value in tuned.best.settings.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(tune, __doc__)
