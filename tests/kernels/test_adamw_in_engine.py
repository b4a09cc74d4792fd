"""Ranks of a DeepSpeed engine train with AdamW's kernel, which clips, as a bare loop does with torch's own."""

from __future__ import annotations

import multiprocessing
import runpy
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flows.config.engine import EngineConfig, Precision
from flows.config.launcher import LauncherConfig
from flows.config.model import Kernels, ModelConfig
from flows.config.optimizer import OptimizerConfig
from flows.config.tracking import TrackingConfig
from flows.config.training import Objective, TrainConfig, TrainingRun
from flows.model.decoder import Decoder, initialize
from kernels.dispatch import INTERPRETED
from tests.kernels.adamw_ranks import Work

pytestmark = pytest.mark.distributed
RANKS = 2 if INTERPRETED else 1  # on a GPU, one rank is what one GPU can hold
STEPS, VOCABULARY, LENGTH = 3, 40, 8
RATE, DECAY, CLIP = 1e-2, 0.1, 0.3
MODEL = ModelConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    initializer_range=0.3,
)  # fmt: skip
EPS = torch.finfo(torch.float32).eps
Results = Callable[[str], list[dict[str, Any]]]


def run_of(stage: int, precision: Precision = Precision.fp32, kernels: Kernels = Kernels.triton) -> TrainingRun:
    optimizer = OptimizerConfig(learning_rate=RATE, weight_decay=DECAY)
    return TrainingRun(
        objective=Objective.cross_entropy,
        model=replace(MODEL, kernels=kernels),
        train=TrainConfig(
            global_batch_size=4, micro_batch_size=1, gradient_clipping=CLIP, optimizer=optimizer, warmup_steps=0
        ),
        engine=EngineConfig(zero_stage=stage, precision=precision),
        launcher=LauncherConfig(num_ranks=RANKS),
        tracking=TrackingConfig(tensorboard=False),
        sequence_length=LENGTH,
        seed=0,
    )


RUNS = {
    "reference": run_of(1, kernels=Kernels.reference),
    "reference in bf16": run_of(1, Precision.bf16, Kernels.reference),
    "stage 1": run_of(1),
    "stage 1 in bf16": run_of(1, Precision.bf16),
}
MORE_RUNS = {
    "reference at 0": run_of(0, kernels=Kernels.reference),
    "stage 0": run_of(0),
    "stage 2": run_of(2),
    "stage 3": run_of(3),
}
EXHAUSTIVE = [pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE_RUNS]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (STEPS, 4, 1, LENGTH + 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> Results:
    """Of each rank, what a case gave."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a CUDA GPU")

    @cache
    def all_of(more: bool) -> list[dict[str, Any]]:
        work = Work(tmp_path_factory.mktemp("ranks"), "cpu" if INTERPRETED else "cuda", RUNS, tokens, VOCABULARY)
        work = replace(work, runs=MORE_RUNS) if more else replace(work, saved="reference", resumed="stage 1")
        start(work)
        return [torch.load(work.directory / f"rank-{rank}.pt") for rank in range(RANKS)]

    return lambda name: [of_rank[name] for of_rank in all_of(name in MORE_RUNS)]


def start(work: Work) -> None:
    """Runs all ranks to their end, forked from a process that has imported DeepSpeed once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flows.training.engine", "torch._dynamo"])
    body = str(Path(__file__).with_name("adamw_ranks.py"))
    ranks = []
    for rank in range(RANKS):
        arguments = {"work": work, "rank": rank, "ranks": RANKS, "port": port}
        ranks.append(context.Process(target=runpy.run_path, args=(body, {"arguments": arguments}, "rank")))
        ranks[-1].start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0


@dataclass
class Bare:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


@cache
def bare(tokens: Tensor, dtype: torch.dtype) -> Bare:
    """One process, whole batches, torch's own AdamW and clipping."""
    model = Decoder(replace(MODEL, kernels=Kernels.reference), VOCABULARY)
    initialize(model, 0)
    model.to(dtype)
    parameters = list(model.parameters())
    groups = [{"params": [p], "weight_decay": DECAY if p.dim() > 1 else 0.0} for p in parameters]
    constants = OptimizerConfig()
    optimizer = torch.optim.AdamW(groups, RATE, (constants.beta1, constants.beta2), constants.eps)
    losses, norms = [], []
    for batch in tokens:
        logits = model(batch[:, 0, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 0, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return Bare(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("name", ["reference", "stage 1", *EXHAUSTIVE])
def test_curve_norms_and_weights_are_those_of_a_bare_loop(name: str, results: Results, tokens: Tensor) -> None:
    """Within four times what float32 itself costs the bare loop against float64, plus rounding."""
    truth, plain = bare(tokens, torch.float64), bare(tokens, torch.float32)
    assert min(truth.norms) > CLIP
    result = results(name)[0]
    measured = [(result["losses"], truth.losses, plain.losses)]
    measured.append(([measures["grad_norm"] for measures in result["measures"]], truth.norms, plain.norms))
    measured += [(result["weights"][key], truth.weights[key], plain.weights[key]) for key in truth.weights]
    for actual, exact, achieved in (map(torch.as_tensor, values) for values in measured):
        noise = (achieved - exact).abs().max()
        assert (actual - exact).abs().max() <= 4 * noise + 4 * EPS * exact.abs().max()


def test_in_bf16_the_norm_is_deepspeeds(results: Results) -> None:
    theirs, ours = results("reference in bf16")[0], results("stage 1 in bf16")[0]
    of_same_gradients = theirs["measures"][0]["grad_norm"], ours["measures"][0]["grad_norm"]
    assert of_same_gradients[0] == pytest.approx(of_same_gradients[1], rel=8 * EPS)
    # bf16 keeps 8 bits: some 20 roundings on the way to the loss cost 2^-9 each at most, and partly cancel
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=20**0.5 * 2**-9)


@pytest.mark.parametrize("name", ["stage 1", *EXHAUSTIVE[1:]])
def test_an_infinite_gradient_on_one_rank_changes_nothing_on_any(name: str, results: Results) -> None:
    for result in results(name):
        assert result["infinite"] == {"skipped_updates": 1}
        assert result["finite again"]["skipped_updates"] == 1
        assert result["finite again"]["grad_norm"] > 0
        before, after, later = result["held"], result["held after infinity"], result["held after all"]
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not any(torch.equal(before[key], later[key]) for key in before if key.endswith(("exp_avg", "step")))


def test_a_checkpoint_of_torchs_optimizer_loads_into_ours(results: Results) -> None:
    for saved, loaded in zip(results("reference"), results("stage 1"), strict=True):
        assert saved["held"].keys() == loaded["loaded"].keys()
        assert {key.rpartition(" ")[2] for key in saved["held"]} == {"weight", "step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(saved["held"][key], loaded["loaded"][key]) for key in saved["held"])
        assert loaded["next"] == saved["next"]  # the loss of the same weights
        for key, value in saved["after"].items():  # one update later, by other kernels
            assert (loaded["after"][key] - value).abs().max() <= 8 * EPS * value.abs().max(), key
