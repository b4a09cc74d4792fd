"""Says what `python -m flows.train` would need with the same words: memory, time, FLOPs, cost; trains nothing.

    python -m flows.plan +experiment=quickstart
    python -m flows.plan model=decoder_125m engine=zero1_bf16 launcher.num_ranks=8 plan.hardware=h100
    python -m flows.plan +experiment=quickstart plan.hardware=l4 plan.price_per_device_hour=0.8

One table for each model that is trained, a line for each cache or text that a teacher leaves its students. Peaks of
GPUs are those of their data sheets, this machine's processor is measured for half a second. The report of a run
compares its plan with what was measured.
"""

from __future__ import annotations

from flows.artifact import Artifact, ArtifactStore, Stage, read_manifest
from flows.chain import look_along
from flows.compose import run_cli
from flows.config import Config
from flows.config.students import teacher_caches, teacher_texts
from flows.training.hardware import find_hardware
from flows.training.lesson_plan import plan_cache, plan_text
from flows.training.plan import make_plan, render_plan
from flows.training.record_layout import RecordLayout


def plan(config: Config) -> None:
    """Prints the plan of each model that the run trains."""
    hardware = find_hardware(config.plan.hardware, config.engine.device)
    vocab_size, train_tokens = _data(config)
    shapes = config.shapes()
    for name, run in config.training_runs().items():
        teacher = shapes[config.steps[name].source] if run.runs_teacher else None
        print(render_plan(name, make_plan(run, vocab_size, hardware, config.plan, teacher, train_tokens)))
    for teacher_name, cache in teacher_caches(config).items():
        layout = RecordLayout(cache.top_k, vocab_size)
        most = cache.sequences if train_tokens is None else min(cache.sequences, train_tokens // cache.sequence_length)
        tokens = most * cache.sequence_length
        planned = plan_cache(shapes[teacher_name], layout, tokens, cache.sequence_length, hardware)
        print(f"teacher cache of {teacher_name}: {planned.in_words()}")
    for teacher_name, text in teacher_texts(config).items():
        print(f"text of {teacher_name}: {plan_text(shapes[teacher_name], vocab_size, text, hardware).in_words()}")
    if train_tokens is None:
        print("The data has not been encoded yet: epochs are not known, and the vocabulary is the one asked for.")


def _data(config: Config) -> tuple[int, int | None]:
    """Size of the vocabulary and of the training split, as encoded before; as asked for, and None, if it was not."""
    store = ArtifactStore(config.artifacts_dir / "store")
    found: dict[str, Artifact] = {}

    def look(stage: Stage) -> Artifact | None:
        if "tokens" in found:
            return None
        try:
            manifest = read_manifest(store.root / store.key(stage))  # a plan may trust it without hashing all bytes
        except FileNotFoundError:
            return None
        found[stage.name] = Artifact(stage.name, manifest["key"], manifest["digest"], store.root, manifest["metrics"])
        return found[stage.name]

    look_along(config, look)
    if "tokens" not in found:
        return config.data.tokenizer.vocab_size, None
    return found["tokenizer"].metrics["vocab_size"], found["tokens"].metrics["splits"]["train"]["tokens"]


if __name__ == "__main__":
    run_cli(plan, __doc__)
