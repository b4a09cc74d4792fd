"""Says, stage by stage, what `python -m flows.train` would do with the same words, and why; runs nothing.

    python -m flows.explain +experiment=quickstart distill.temperature=3

A stage is skipped when its artifact exists and every byte of it verifies. Otherwise it runs, and the line says what is
different from the last run under this name: a setting, an input, the code, files outside, or damage.
"""

from __future__ import annotations

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.chain import look_along
from flows.compose import run_cli
from flows.config import Config
from flows.run_record import RunRecord


def explain(config: Config) -> None:
    """Prints one line per stage: skip or run, and the reason."""
    store = ArtifactStore(config.artifacts_dir / "store")
    record = RunRecord.load(config)

    def look(stage: Stage) -> Artifact | None:
        found, reason = store.find(stage)
        if found is None:
            waiting = [role for role, parent in stage.parents.items() if not parent.digest]
            why = f"its input {waiting[0]} runs" if waiting else record.why_it_runs(stage, reason)
            print(f"{stage.name:<22} run   {why}")
            if stage.name == "gates":
                print("entry, passport, publish, report follow from what the gates choose")
                return None
            return Artifact(stage=stage.name, key="", digest="", path=store.root)
        print(f"{stage.name:<22} skip  {reason}")
        return found

    look_along(config, look)


if __name__ == "__main__":
    run_cli(explain, __doc__)
