"""What can be known of a pruned or healed candidate before it is made, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from flows.compose import compose_config
from flows.config import Config, ConfigError
from flows.config.engine import EngineConfig
from flows.config.launcher import LauncherConfig
from flows.config.model import ModelConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.prune import PruneConfig, SparsityMethod, pruned_shape
from flows.config.steps import StepConfig
from flows.config.training import DistillConfig, TrainConfig
from flows.model.arithmetic import parameter_count
from flows.plan import plan

HALF = PruneConfig(intermediate_size=352)


def test_the_shape_of_every_candidate_is_known_before_it_is_made() -> None:
    config = compose_config(
        ["+experiment=prune_heal", "+steps.shallow={prune: healed, settings: {layers: [0, 2], hidden_size: 144}}"]
    )
    shapes = config.shapes()
    assert (shapes["pruned"].hidden_size, shapes["pruned"].intermediate_size) == (144, 256)
    assert shapes["pruned"].head_dim == shapes["base"].head_dim == 48
    assert shapes["healed"] == shapes["healed_int8"] == shapes["pruned"]
    assert (shapes["shallow"].num_hidden_layers, shapes["shallow"].intermediate_size) == (2, 256)
    run = config.training_runs()["healed"]
    assert (run.model, run.start, run.keep_zeros) == (shapes["pruned"], "pruned", False)


def test_groups_go_with_their_query_heads() -> None:
    base = ModelConfig()
    grouped = pruned_shape(base, PruneConfig(num_key_value_heads=1), "base")
    assert (grouped.num_key_value_heads, grouped.num_attention_heads, grouped.head_dim) == (1, 2, 64)
    both = pruned_shape(base, PruneConfig(num_key_value_heads=1, num_attention_heads=1), "base")
    assert (both.num_key_value_heads, both.num_attention_heads, both.head_dim) == (1, 1, 64)


def test_what_starts_sparse_stays_sparse() -> None:
    steps = {
        "sparse": StepConfig(prune="base"),
        "healed": StepConfig(distill="base", start="sparse"),
        "again": StepConfig(distill="base", start="healed"),
        "student": StepConfig(distill="healed"),
    }
    config = Config(steps=steps, prune=PruneConfig(sparsity=0.5))
    assert [run.keep_zeros for run in config.training_runs().values()] == [False, True, True, False]
    assert config.sparse_candidates() == {"sparse": "0.5", "healed": "0.5", "again": "0.5"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "prune.sparsity=0.0 and a shape without numbers leave base as it is"),
        ({"hidden_size": 300}, "prune.hidden_size=300 must not exceed the 256 of base. Set prune.hidden_size=128"),
        ({"hidden_size": 0}, "prune.hidden_size=0 must be greater than 0"),
        ({"num_attention_heads": 3}, r"heads=3 must be one of \[2, 4\]: base has 2 query heads in each group"),
        ({"layers": (0, 4)}, r"prune.layers=\[0, 4\] names a layer beyond the last of base, 3"),
        ({"layers": (2, 0)}, r"prune.layers=\[2, 0\] must be numbers of layers from 0 on, each once, in rising"),
        ({"num_hidden_layers": 5}, "prune.num_hidden_layers=5 must not exceed the 4 of base"),
        ({"layers": (0,), "num_hidden_layers": 1}, "prune.num_hidden_layers=1 cannot be combined with"),
        ({"sparsity": 1.0}, "prune.sparsity=1.0 must be 0 or more and below 1"),
        ({"sparsity": 0.5, "hidden_size": 64}, "prune.sparsity=0.5 cannot be combined with a smaller shape"),
        ({"sparsity": 0.5, "pattern": "1:4"}, "prune.pattern=1:4 must be null or 2:4"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "prune.sparsity=0.4 must be 0.5 with prune.pattern=2:4"),
        (
            {"sparsity": 0.5, "pattern": "2:4", "method": SparsityMethod.magnitude_global},
            "prune.method=magnitude_global compares weights of all layers",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(steps={"pruned": StepConfig(prune="base")}, prune=PruneConfig(**settings))


def test_experts_cannot_be_pruned() -> None:
    with pytest.raises(ConfigError, match=r"model.num_experts=2 cannot be pruned"):
        Config(steps={"pruned": StepConfig(prune="base")}, prune=HALF, model=ModelConfig(num_experts=2))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            {"pruned": StepConfig(prune="base", start="base")},
            "steps.pruned.start=base is where training starts, and prune trains nothing",
        ),
        (
            {"healed": StepConfig(distill="base", start="later")},
            r"steps.healed.start=later is not a floating-point model made before it; before it are \['base'\]",
        ),
        (
            {"int8": StepConfig(quantize="base"), "healed": StepConfig(distill="base", start="int8")},
            r"steps.healed.start=int8 is not a floating-point model made before it; before it are \['base'\]",
        ),
        (
            {"int8": StepConfig(quantize="base"), "pruned": StepConfig(prune="int8")},
            "steps.pruned.prune=int8 is quantized, and what is quantized is final. Set steps.pruned.prune=base",
        ),
    ],
)
def test_steps_that_lead_nowhere_are_refused(steps: dict[str, StepConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(steps=steps, prune=HALF)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"distill": DistillConfig(train=TrainConfig(optimizer=OptimizerConfig(name=Optimizer.muon)))},
            "distill.train.optimizer.name=muon cannot be combined with the sparse pruned to start from",
        ),
        (
            {"engine": EngineConfig(tensor_parallel_size=2), "launcher": LauncherConfig(num_ranks=2)},
            "engine.tensor_parallel_size=2 cannot be combined with the sparse pruned",
        ),
    ],
)
def test_what_would_fill_zeros_is_refused(settings: dict[str, Any], message: str) -> None:
    steps = {"pruned": StepConfig(prune="base"), "healed": StepConfig(distill="base", start="pruned")}
    with pytest.raises(ConfigError, match=message):
        Config(steps=steps, prune=PruneConfig(sparsity=0.5), **settings)


def test_a_plan_counts_the_pruned_shape_also_as_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    more = "+steps.student={distill: pruned, settings: {student: {hidden_size: 64, num_hidden_layers: 1}}}"
    config = compose_config(["+experiment=prune_heal", more, "plan.hardware=h100"])
    plan(config)
    left = parameter_count(config.shapes()["pruned"], config.data.tokenizer.vocab_size)
    whole = parameter_count(config.model, config.data.tokenizer.vocab_size)
    printed = capsys.readouterr().out
    assert left < 0.55 * whole
    assert f"{left:,}, and {whole:,} of the teacher" in printed
    assert f", and {left:,} of the teacher" in printed
