"""One run, several layouts: interrupted on some ranks at one ZeRO stage, taken up on others at another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flows.artifact import CARRIES_ON, Artifact, ArtifactStore, Stage
from flows.config.engine import EngineConfig, Precision
from flows.config.training import TrainingRun
from flows.data.packed import PackedDataset
from flows.launcher import launch_ranks
from flows.model.checkpoint import load_decoder
from flows.training.fragment_files import PieceReader
from flows.training.fragments import WEIGHT
from flows.training.receipts import RECEIPTS, verify_lines
from tests.training.all_layouts import CHAINS, UPDATES
from tests.training.interruption import interrupted, kill
from tests.training.test_parity import assert_same_curve

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
    assert {store.workplace(stage(config)) for config in same} == {store.workplace(stage(run))}
    assert len({store.workplace(stage(config)) for config in [run, *other]}) == 1 + len(other)
    assert len({store.key(stage(config)) for config in [run, *same, *other]}) == 1 + len(same) + len(other)


def assembled(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of a checkpoint, whole and flat, by parameter and key."""
    shapes = json.loads((checkpoint / "manifest.json").read_text())["shapes"]
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    with PieceReader(checkpoint.glob("*.safetensors")) as reader:
        for name, shape in shapes.items():
            tensors[name] = {}
            for key in reader.keys(name):
                number = reader.scalar(name, key)
                if number is None:
                    number = torch.full((torch.Size(shape).numel(),), torch.nan)
                    reader.read_into(number, name, key, 0)
                tensors[name][key] = number
    return tensors


@pytest.mark.distributed
def test_every_stage_takes_over_the_state_of_every_other_bit_for_bit(tiny_run: Run, tmp_path: Path) -> None:
    launch_ranks("tests.training.all_layouts", tmp_path, tiny_run(ranks=2).launcher, tmp_path / "logs")
    losses = json.loads((tmp_path / "losses.json").read_text())
    for kind, chain in CHAINS.items():
        states = [assembled(tmp_path / kind / str(at) / f"step-{UPDATES:08d}") for at in range(len(chain))]
        expected_keys = {WEIGHT, "momentum_buffer"} if kind == "sgd" else {WEIGHT, "exp_avg", "exp_avg_sq", "step"}
        for at, state in enumerate(states):
            assert state.keys() == states[0].keys()
            for name, tensors in state.items():
                assert tensors.keys() == expected_keys
                for key, tensor in tensors.items():
                    assert torch.equal(tensor, states[0][name][key]), f"{kind}: {key} of {name} at {chain[: at + 1]}"
            for name, weight in load_decoder(tmp_path / kind / str(at) / "best").named_parameters():
                trained = states[0][name][WEIGHT]
                trained = trained.bfloat16().float() if kind == "bf16" else trained
                assert torch.equal(weight.flatten(), trained), f"{kind}: {name}, consolidated at {chain[: at + 1]}"
        # The same forward pass on the same weights; ranks add up losses in the same order.
        assert losses[kind] == [losses[kind][0]] * len(chain)
