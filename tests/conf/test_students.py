"""Kinds of distillation in the configuration: what goes together, what is refused, and which stages follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flows.artifact import Artifact, Stage
from flows.chain import run_chain
from flows.compose import compose_config
from flows.config import Config, ConfigError, from_plain, to_plain
from flows.config.steps import BASE
from flows.config.students import teacher_caches, teacher_texts

Changed = Callable[..., Config]
CACHED = "distill.cache.top_k=64"
LONGER = "steps.second.settings={temperature: 4, train: {max_steps: 340}}"


@pytest.fixture(scope="module")
def changed() -> Changed:
    """A configuration with two students of base, changed as words of a command line say."""
    words = ["steps=distill", "+steps.second={distill: base}", "+steps.third={distill: base, settings: {alpha: 0.4}}"]
    config = compose_config([*words, "train.micro_batch_size=4", "distill.train.micro_batch_size=4"])

    def change(*words: str) -> Config:
        plain = to_plain(config)
        for word in words:
            name, _, text = word.partition("=")
            *path, last = name.split(".")
            section, value = plain, yaml.safe_load(text)
            for part in path:
                section = section[part]
            merged = isinstance(value, dict) and path[0] in ("distill", "data")
            section[last] = section[last] | value if merged else value
        return from_plain(Config, plain)

    return change


def stages(config: Config) -> dict[str, Stage]:
    """All stages up to the gates, which choose nothing, by name."""
    seen: dict[str, Stage] = {}

    def look(stage: Stage) -> Artifact:
        assert stage.name not in seen
        seen[stage.name] = stage
        return Artifact(stage.name, stage.name, stage.name, Path(stage.name), {"chosen": None})

    run_chain(config, look)
    return seen


def test_one_cache_serves_all_students_of_a_teacher_whatever_their_temperature(changed: Changed) -> None:
    found = stages(changed(CACHED, LONGER))
    cache = found["base_teacher_cache"]
    assert set(cache.parents) == {"teacher", "tokens", "tokenizer"}
    for student in ("student", "second", "third"):
        assert found[student].parents["cache"].key == "base_teacher_cache"
    assert cache.config.sequences == 340 * 16
    for change in ("distill.temperature=3", "distill.student.hidden_size=64", "distill.alpha=0.9"):
        other = teacher_caches(changed(CACHED, LONGER, change))
        assert other == {BASE: cache.config}
    for change in ("distill.cache.top_k=32", "data.sequence_length=128", "seed=1", "data.document_masks=false"):
        assert teacher_caches(changed(LONGER, CACHED, change, "verify.lengths=[1]")) != {BASE: cache.config}
    assert "base_teacher_cache" not in stages(changed())


def test_a_student_of_text_is_trained_on_it_and_evaluated_on_the_corpus(changed: Changed) -> None:
    found = stages(changed("distill.teacher_sequences=40"))
    for student in ("student", "second"):
        assert found[student].parents["tokens"].key == "base_teacher_text"
        assert found[student].parents["validation"].key == "tokens"
    assert found["base_teacher_text"].config.sequences == 40


def test_a_student_of_layers_has_the_teacher_s_shape_and_its_zeros(changed: Changed) -> None:
    config = changed("distill.student_layers=[0,1,3]", "model.hidden_size=512", "distill.student.kernels=reference")
    student = config.training_runs()["student"]
    assert student.model == replace(config.model, num_hidden_layers=3, kernels=student.model.kernels)
    assert student.student_layers == (0, 1, 3)
    assert changed("distill.student_every=2").training_runs()["student"].student_layers == (0, 2)
    sparse = ("prune.sparsity=0.5", "steps.second={prune: base}", "steps.third={distill: second}")
    assert changed(*sparse, "distill.student_every=2").sparse_candidates() == {"second": "0.5", "third": "0.5"}
    assert changed(*sparse).sparse_candidates() == {"second": "0.5"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.cache.top_k=-1"], "distill.cache.top_k=-1 must not be negative"),
        ([CACHED, "distill.temperature=0.5"], "distill.temperature=0.5 must be 1 or more with distill.cache.top_k=64"),
        ([CACHED, "distill.alpha=0"], "distill.cache.top_k=64 is of no use with distill.alpha=0"),
        ([CACHED, "distill.hidden.weight=1"], "distill.hidden.weight=1.0 cannot be combined with distill.cache.top_k"),
        ([CACHED, "distill.on_policy_share=1"], "distill.on_policy_share=1.0 cannot be combined with distill.cache"),
        (
            [CACHED, "engine.pipeline_stages=2", "launcher.num_ranks=2"],
            "engine.pipeline_stages=2 cannot be combined with distill.cache.top_k=64",
        ),
        (
            [CACHED, "steps.second.settings={cache: {top_k: 8}}"],
            "steps.second.settings.cache.top_k=8 is not the 64 of another student of base",
        ),
        ([CACHED, "distill.teacher_sequences=5"], "distill.teacher_sequences=5 cannot be combined with distill.cache"),
        (["distill.teacher_sequences=-5"], "distill.teacher_sequences=-5 must not be negative"),
        (
            ["distill.teacher_sequences=5", "steps.second.settings={teacher_sequences: 6}"],
            r"steps.second.settings=.* is not what another student of base reads",
        ),
        (
            ["distill.teacher_sequences=5", "data.corpus={source: files, format: messages, paths: [x]}"],
            "distill.teacher_sequences=5 cannot be combined with conversations",
        ),
        (
            ["distill.on_policy_share=0.5", "engine.zero_stage=3"],
            "engine.zero_stage=3 cannot be combined with distill.on_policy_share=0.5: .* Set engine.zero_stage=2",
        ),
        (["distill.on_policy_share=1.5"], "distill.on_policy_share=1.5 must lie between 0 and 1"),
        (
            ["distill.on_policy_share=0.5", "distill.generation.new_tokens=256"],
            "new_tokens=256 after distill.generation.prompt_tokens=32 is more than .* Set .*new_tokens=225, or fewer",
        ),
        (["distill.generation.temperature=-1"], "distill.generation.temperature=-1.0 must not be negative"),
        (["distill.hidden.weight=-1"], "distill.hidden.weight=-1.0 must not be negative"),
        (["distill.hidden={weight: 1, layers: [4]}"], r"distill.hidden.layers=\[4\] must name a layer of base, 0 to 3"),
        (
            ["distill.relations.weight=1", "engine.sequence_parallel_size=2", "launcher.num_ranks=2"],
            "engine.sequence_parallel_size=2 cannot be combined with distill.relations.weight=1.0",
        ),
        (
            ["distill.relations.weight=1", "engine.activation_checkpointing=true"],
            "engine.activation_checkpointing=True cannot be combined with distill.relations.weight=1.0",
        ),
        (["distill.relations={weight: 1, heads: 5}"], "distill.relations.heads=5 must divide the .* that queries of"),
        (["distill.relations={weight: 1, layer: 4}"], "distill.relations.layer=4 must be a layer of base, which has 4"),
        (["distill.student_layers=[0,9]"], r"distill.student_layers=\[0, 9\] names a layer beyond the last of base, 3"),
        (["distill.student_layers=[1,1]"], r"distill.student_layers=\[1, 1\] must be numbers of layers from 0 on"),
        (["distill.student_every=1"], "distill.student_every=1 must be 2 or more"),
        (
            ["distill.student_every=2", "steps.second.start=student"],
            "steps.second.start=student cannot be combined with distill.student_every",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_remedy(changed: Changed, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(*words)


def test_a_weight_of_zero_asks_no_teacher(changed: Changed) -> None:
    assert not changed("distill.alpha=0").training_runs()["student"].runs_teacher
    for word in ("distill.hidden.weight=1", "distill.relations.weight=1", "distill.on_policy_share=0.1"):
        assert changed("distill.alpha=0", word).training_runs()["student"].runs_teacher
    assert teacher_caches(changed()) == teacher_texts(changed()) == {}
