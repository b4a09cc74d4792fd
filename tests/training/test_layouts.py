"""One run, several layouts: interrupted on some ranks at one ZeRO stage, taken up on others at another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.artifact import CARRIES_ON, Artifact, ArtifactStore, Stage
from flows.config import to_json
from flows.config.engine import EngineConfig, Precision
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.tracking import TrackingConfig
from flows.config.training import TrainingRun
from flows.data.packed import PackedDataset
from flows.launcher import launch_ranks
from flows.model.checkpoint import load_decoder
from flows.training.fragment_files import PieceReader
from flows.training.fragments import WEIGHT
from flows.training.receipts import RECEIPTS, verify_lines
from flows.training.weight_parts import whole_name, whole_shape
from tests.training.all_layouts import UPDATES, WORK, Link, Work
from tests.training.conftest import TINY
from tests.training.interruption import interrupted, kill
from tests.training.test_parity import EPS, assert_same_curve

Trained = Callable[..., Artifact]
Losses = Callable[[Artifact], list[float]]
Run = Callable[..., TrainingRun]


def layout(run: TrainingRun, ranks: int, zero_stage: int) -> TrainingRun:
    launcher = replace(run.launcher, num_ranks=ranks)
    return replace(run, launcher=launcher, engine=replace(run.engine, zero_stage=zero_stage))


@pytest.mark.distributed
def test_four_ranks_then_two_then_one_give_one_loss_curve(
    trained: Trained, losses: Losses, tiny_run: Run, data: dict[str, Artifact], tmp_path: Path
) -> None:
    run = tiny_run(micro_batch_size=1, max_steps=60, checkpoint_interval_steps=10, eval_interval_steps=30)
    interrupted(lambda: trained(layout(run, 4, 2)), tmp_path / "store", "step-00000010", lambda: kill(2))
    interrupted(lambda: trained(layout(run, 2, 3)), tmp_path / "store", "step-00000030")
    store, last = ArtifactStore(tmp_path / "store"), layout(run, 1, 0)
    assert store.find(Stage("base", "flows.training.stage", last, data))[1].endswith(CARRIES_ON)
    whole = trained(last)
    layouts = whole.metrics["layouts"]
    assert [(step["ranks"], step["zero_stage"]) for step in layouts] == [(4, 2), (2, 3), (1, 0)]
    assert 0 == layouts[0]["from_step"] < 10 <= layouts[1]["from_step"] < 30 <= layouts[2]["from_step"] < 60
    assert len(losses(whole)) == 60
    assert_same_curve(losses(whole), run, data)
    lines = [json.loads(line) for line in (whole.path / "logs" / RECEIPTS).read_text().splitlines()]
    stream = PackedDataset(data["tokens"].path, "train", run.sequence_length)
    assert verify_lines(lines, stream, last, data["tokens"].digest, 60).link == whole.metrics["receipt"]


def test_what_decides_the_loss_curve_names_the_place_where_a_run_is_taken_up(
    tiny_run: Run, data: dict[str, Artifact], tmp_path: Path
) -> None:
    run, store = tiny_run(), ArtifactStore(tmp_path)

    def stage(config: TrainingRun) -> Stage:
        return Stage("base", "flows.training.stage", config, data)

    same = [
        layout(tiny_run(micro_batch_size=2), 4, 3),
        replace(run, train=replace(run.train, micro_batch_size=2, keep_checkpoints=9)),
    ]
    other = [
        replace(run, seed=1),
        replace(run, train=replace(run.train, max_steps=13)),
        replace(run, engine=EngineConfig(precision=Precision.bf16)),
        replace(run, engine=EngineConfig(deepspeed={"communication_data_type": "bf16"})),
    ]
    experts = replace(run, model=replace(run.model, num_experts=4))
    other += [experts, replace(experts, train=replace(run.train, micro_batch_size=2))]
    assert {store.workplace(stage(config)) for config in same} == {store.workplace(stage(run))}
    assert len({store.workplace(stage(config)) for config in [run, *other]}) == 1 + len(other)
    assert len({store.key(stage(config)) for config in [run, *same, *other]}) == 1 + len(same) + len(other)
    tracked = replace(run, tracking=TrackingConfig(csv=True, profile_steps=(1, 2)))
    assert store.key(stage(tracked)) == store.key(stage(run)), "another tracker trains the same model"


def assembled(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of a checkpoint, whole and flat, by parameter and key."""
    shapes = json.loads((checkpoint / "manifest.json").read_text())["shapes"]
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    with PieceReader(checkpoint.glob("*.safetensors"), shapes) as reader:
        for name, shape in {whole_name(name): whole_shape(name, shape) for name, shape in shapes.items()}.items():
            tensors[name] = {}
            for key in reader.keys(name):
                number = reader.scalar(name, key)
                if number is None:
                    number = torch.full((torch.Size(shape).numel(),), torch.nan)
                    reader.read_into(number, name, key, 0)
                tensors[name][key] = number
    return tensors


def handed_on(links: list[Link], directory: Path) -> None:
    """Has links of one number of ranks done by one start of them."""
    (directory / WORK).write_text(to_json(Work(links)))
    launch_ranks("tests.training.all_layouts", directory, links[0].run.launcher, directory / "logs")


def assert_every_tensor_stays(chain: Path, length: int, bf16: bool) -> list[float]:
    """Weights and optimizer state at each place of a chain are those of the first, bit for bit; the losses after it."""
    states = [assembled(chain / str(at) / f"step-{UPDATES:08d}") for at in range(length)]
    for at, state in enumerate(states):
        assert state.keys() == states[0].keys()
        for name, tensors in state.items():
            assert WEIGHT in tensors
            assert tensors.keys() == states[0][name].keys()
            for key, tensor in tensors.items():
                assert torch.equal(tensor, states[0][name][key]), f"{key} of {name} at {at} of {chain}"
        for name, weight in load_decoder(chain / str(at) / "best").named_parameters():
            trained = states[0][name][WEIGHT]
            trained = trained.bfloat16().float() if bf16 else trained
            assert torch.equal(weight.flatten(), trained), f"{name}, consolidated at {at} of {chain}"
    assert all(len(tensors) > 1 for tensors in states[0].values()), "no optimizer state"
    return [json.loads((chain / str(at) / "loss.json").read_text()) for at in range(length)]


STAGES = {"adamw": [0, 1, 2, 3, 0, 3, 2, 1, 0], "sgd": [1, 3, 0], "bf16": [1, 3, 2]}
"""Kind of run, and the ZeRO stages that its state goes through."""


@pytest.mark.distributed
def test_every_stage_takes_over_the_state_of_every_other_bit_for_bit(tiny_run: Run, tmp_path: Path) -> None:
    def run_of(kind: str, zero_stage: int) -> TrainingRun:
        precision = Precision.bf16 if kind == "bf16" else Precision.fp32
        return tiny_run(
            ranks=2,
            micro_batch_size=2,
            optimizer=OptimizerConfig(name=Optimizer.sgd if kind == "sgd" else Optimizer.adamw, learning_rate=1e-2),
            engine=EngineConfig(zero_stage=zero_stage, precision=precision),
        )

    handed_on(
        [Link(kind, at, run_of(kind, z)) for kind, chain in STAGES.items() for at, z in enumerate(chain)], tmp_path
    )
    for kind, chain in STAGES.items():
        losses = assert_every_tensor_stays(tmp_path / kind, len(chain), kind == "bf16")
        # The same forward pass on the same weights; ranks add up losses in the same order.
        assert losses == [losses[0]] * len(chain)


ONE = (1, {})
PIPELINE = (2, {"pipeline_stages": 2})
TENSOR = (2, {"tensor_parallel_size": 2, "zero_stage": 2})
SEQUENCE = (2, {"sequence_parallel_size": 2, "zero_stage": 3})
EXPERT = (2, {"expert_parallel_size": 2})
WIDE = {"num_hidden_layers": 4, "num_key_value_heads": 4}
CHAINS: dict[str, tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]] = {
    "two": ({}, [ONE, PIPELINE, TENSOR, SEQUENCE, PIPELINE, ONE, TENSOR, (2, {"zero_stage": 3}), PIPELINE, (2, {})]),
    "untied": ({"tie_word_embeddings": False}, [PIPELINE, ONE, TENSOR, PIPELINE]),
    "four": (
        WIDE,
        [
            (4, {"tensor_parallel_size": 4}),
            (4, {"tensor_parallel_size": 2, "zero_stage": 3}),
            (4, {"pipeline_stages": 4}),
            (4, {"tensor_parallel_size": 2, "sequence_parallel_size": 2}),
            (4, {"pipeline_stages": 2, "sequence_parallel_size": 2}),
            (2, {"zero_stage": 2}),
            (4, {"tensor_parallel_size": 4, "zero_stage": 0}),
            ONE,
        ],
    ),
    "experts": (
        {"num_experts": 4},
        [ONE, EXPERT, (2, {"zero_stage": 2}), (4, {"expert_parallel_size": 4}), EXPERT, ONE],
    ),
    "bf16": ({}, [ONE, TENSOR, PIPELINE, ONE]),
}
"""Models, and the ranks and engines that their state goes through."""


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("kind", CHAINS)
def test_every_kind_of_parallelism_takes_over_the_state_of_every_other(
    kind: str, tiny_run: Run, tmp_path: Path
) -> None:
    model, chain = CHAINS[kind]
    precision = Precision.bf16 if kind == "bf16" else Precision.fp32
    for at, (ranks, engine) in enumerate(chain):
        config = EngineConfig(precision=precision, **engine)
        size = 2 if kind == "experts" else 2 * config.ranks_per_replica  # theirs decides: see `resumable_as`
        run = tiny_run(ranks=ranks, micro_batch_size=size, engine=config, model=replace(TINY, **model))
        handed_on([Link(kind, at, run)], tmp_path)
    losses = assert_every_tensor_stays(tmp_path / kind, len(chain), kind == "bf16")
    rounding = 2**-8 if kind == "bf16" else 32 * EPS
    assert losses == pytest.approx([losses[0]] * len(chain), rel=rounding)


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_a_run_goes_on_in_any_layout(
    trained: Trained, losses: Losses, tiny_run: Run, data: dict[str, Artifact], tmp_path: Path
) -> None:
    """One loss curve through four ways to share the model, each interrupted."""

    def run_of(ranks: int, engine: dict[str, Any]) -> TrainingRun:
        config = EngineConfig(**engine)
        return tiny_run(
            ranks=ranks,
            micro_batch_size=2 * config.ranks_per_replica,
            engine=config,
            max_steps=60,
            checkpoint_interval_steps=5,
            eval_interval_steps=30,
            ema_decay=0.9,
        )

    for at, place in enumerate((PIPELINE, TENSOR, SEQUENCE), start=1):
        interrupted(lambda place=place: trained(run_of(*place)), tmp_path / "store", f"step-000000{at}0")
    whole = trained(run_of(*ONE))
    assert [{**layout, "from_step": 0} for layout in whole.metrics["layouts"]] == [
        {"from_step": 0, "ranks": ranks, "zero_stage": 1, **engine}
        for ranks, engine in (PIPELINE, TENSOR, SEQUENCE, ONE)
    ]
    assert len(losses(whole)) == 60
    assert_same_curve(losses(whole), run_of(*ONE), data)
