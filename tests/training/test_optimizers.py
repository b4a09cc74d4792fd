"""Every optimizer on two ranks gives the curve of a bare torch loop; so do averages, frozen weights and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from flows.artifact import Artifact
from flows.config import to_json
from flows.config.engine import EngineConfig
from flows.config.launcher import LauncherConfig
from flows.config.lora import LoraConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.training import Schedule, TrainingRun
from flows.data.packed import PackedDataset, sample_order
from flows.launcher import launch_ranks
from flows.model.checkpoint import load_decoder, save_decoder
from flows.model.decoder import Decoder, initialize
from flows.training.lora import DOWN, UP
from flows.training.schedules import learning_rate
from flows.training.trainable import matches
from tests.training.conftest import TINY, VOCAB_SIZE, tiny_run
from tests.training.optimizer_ranks import Cases

pytestmark = pytest.mark.distributed
RATES = {
    Optimizer.adamw: 1e-2,
    Optimizer.adam: 1e-3,
    Optimizer.sgd: 0.1,
    Optimizer.rmsprop: 1e-3,
    Optimizer.lion: 1e-3,
    Optimizer.muon: 1e-2,
}
DECAY = 0.05
LORA = LoraConfig(rank=4, alpha=8.0, targets=("*.self_attn.?_proj",), replaced=("model.norm",))
FROZEN = ("model.layers.0.*", "model.embed_tokens.weight")


def case(name: Optimizer, zero_stage: int, **train: Any) -> TrainingRun:
    constants = OptimizerConfig(
        name=name,
        learning_rate=RATES[name],
        weight_decay=DECAY,
        momentum=0.5,
        beta2=0.98,
        decay_embeddings=zero_stage != 1,
    )
    run = tiny_run(
        ranks=2, micro_batch_size=2, engine=EngineConfig(zero_stage=zero_stage), optimizer=constants, **train
    )
    return replace(run, seed=zero_stage)


def runs(initial_weights: Path) -> dict[str, TrainingRun]:
    """The cases: each optimizer with each ZeRO stage it may meet is too many, so stages take turns."""

    def adapted(zero_stage: int) -> TrainingRun:
        run = case(Optimizer.adamw, zero_stage, ema_decay=0.9)
        model = replace(TINY, initial_weights=initial_weights)
        return replace(run, model=model, train=replace(run.train, lora=LORA))

    return {
        "adam": case(Optimizer.adam, 2),
        "sgd": case(Optimizer.sgd, 1, schedule=Schedule.wsd),
        "rmsprop": case(Optimizer.rmsprop, 3),
        **{f"lion-{stage}": case(Optimizer.lion, stage) for stage in (0, 2, 3)},
        **{f"muon-{stage}": case(Optimizer.muon, stage) for stage in (0, 1, 2)},
        **{f"ema-{stage}": case(Optimizer.adamw, stage, ema_decay=0.8) for stage in (0, 1, 2, 3)},
        **{f"frozen-{stage}": case(Optimizer.adamw, stage, freeze=FROZEN) for stage in (1, 3)},
        **{f"lora-{stage}": adapted(stage) for stage in (1, 3)},
    }


RESUMED = {"lion-2": 5, "muon-1": 5, "ema-0": 5, "ema-2": 5, "ema-3": 5, "lora-3": 5, "frozen-1": 5}
NAMES = list(runs(Path()))
SELDOM = {"lion-0", "lion-3", "muon-0", "muon-2", "ema-1", "ema-2", "frozen-3", "lora-1"}
"""The same optimizers, averages and adapters under yet another ZeRO stage."""


def cases_of(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.exhaustive) if name in SELDOM else name for name in names]


@dataclass
class Bare:
    """What the same run gives without an engine: one process, whole batches, no accumulation."""

    losses: list[float]
    validation_loss: float
    weights: dict[str, Tensor]


@dataclass
class Trained:
    run: TrainingRun
    result: dict[str, Any]
    weights: dict[str, Tensor]
    bare: Callable[[torch.dtype], Bare]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Artifact], request: pytest.FixtureRequest
) -> Callable[[str], Trained]:
    """Of every case that a chosen test asks for, in one start of two ranks."""
    chosen = [item for item in request.session.items if item.path == request.path]
    names = {item.callspec.params["name"] for item in chosen if isinstance(item, pytest.Function)}
    directory = tmp_path_factory.mktemp("optimizers")
    start = Decoder(TINY, VOCAB_SIZE)
    initialize(start, 7)
    save_decoder(directory / "start", start.state_dict(), TINY, VOCAB_SIZE, 64, 0)
    wanted = {name: run for name, run in runs(directory / "start").items() if name in names}
    cases = Cases(data["tokens"].path, directory, wanted, RESUMED)
    (directory / "cases.json").write_text(to_json(cases))
    ranks = LauncherConfig(num_ranks=2, threads_per_rank=1, stall_timeout_s=300)
    launch_ranks("tests.training.optimizer_ranks", directory / "cases.json", ranks, directory)

    @cache
    def bare(name: str, dtype: torch.dtype) -> Bare:
        return bare_loop(cases.runs[name], data["tokens"].path, dtype)

    def of(name: str) -> Trained:
        result = json.loads((directory / f"{name}.json").read_text())
        weights = load_file(directory / f"{name}.safetensors")
        return Trained(cases.runs[name], result, weights, lambda dtype: bare(name, dtype))

    return of


def bare_loop(run: TrainingRun, tokens_dir: Path, dtype: torch.dtype) -> Bare:
    torch.set_num_threads(1)
    config, train = run.train.optimizer, run.train
    if run.model.initial_weights:
        model = load_decoder(run.model.initial_weights)
    else:
        model = Decoder(run.model, VOCAB_SIZE)
        initialize(model, run.seed)
    weights = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    trained = {name: not matches(name, train.freeze) and not train.lora.enabled for name in weights}
    if train.lora.enabled:
        trained["model.norm.weight"] = True
        generator = torch.Generator().manual_seed(run.seed)
        for name in [name for name, _ in model.named_modules() if matches(name, train.lora.targets)]:
            rows, columns = weights[f"{name}.weight"].shape
            drawn = torch.empty(4, columns).normal_(0, 0.25, generator=generator)
            weights |= {name + DOWN: drawn.to(dtype), name + UP: torch.zeros(rows, 4, dtype=dtype)}
            trained |= {name + DOWN: True, name + UP: True}
    for name, weight in weights.items():
        weight.requires_grad_(trained[name])
    learned = [name for name in weights if trained[name]]
    step_of = update_rule(config, {name: weights[name] for name in learned})
    average = {}
    dataset = PackedDataset(tokens_dir, "train", run.sequence_length)
    losses = []
    size = train.global_batch_size
    shell = model.to(dtype)

    def forward(used: dict[str, Tensor], rows: list[Any]) -> Tensor:
        tokens = torch.from_numpy(np.stack(rows))
        whole = {name: weight for name, weight in used.items() if "lora_" not in name}
        for name in used:
            if name.endswith(DOWN):
                module = name.removesuffix(DOWN)
                whole[f"{module}.weight"] = whole[f"{module}.weight"] + 2.0 * (used[module + UP] @ used[name])
        logits = torch.func.functional_call(shell, whole, (tokens[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    for step in range(train.max_steps):
        loss = forward(weights, [dataset[int(i)] for i in sample_order(len(dataset), step * size, size, run.seed)])
        gradients = torch.autograd.grad(loss, [weights[name] for name in learned])
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        scale = min(1.0, train.gradient_clipping / (norm.item() + 1e-6))
        with torch.no_grad():
            step_of(learning_rate(train, step), {n: g * scale for n, g in zip(learned, gradients, strict=True)})
        decay = min(train.ema_decay, step / (step + 9))
        for name in learned:
            value = weights[name].detach()
            average[name] = decay * average[name] + (1 - decay) * value if step else value.clone()
        losses.append(loss.item())
    final = {name: weight.detach() for name, weight in weights.items()} | (average if train.ema_decay else {})
    validation = PackedDataset(tokens_dir, "validation", run.sequence_length)
    rows = [validation[i] for i in range(train.eval_tokens // run.sequence_length)]
    with torch.no_grad():
        return Bare(losses, forward(final, rows).item(), final)


def update_rule(config: OptimizerConfig, weights: dict[str, Tensor]) -> Callable[[float, dict[str, Tensor]], None]:
    """Sets gradients and steps torch's own optimizers; Lion, which torch lacks, written out."""
    embedding = config.weight_decay if config.decay_embeddings else 0.0
    decays = {
        name: 0.0 if weight.dim() == 1 else embedding if "embed_tokens" in name else config.weight_decay
        for name, weight in weights.items()
    }
    betas = (config.beta1, config.beta2)
    if config.name == Optimizer.lion:
        momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}

        def lion(rate: float, gradients: dict[str, Tensor]) -> None:
            for name, gradient in gradients.items():
                sign = torch.sign(betas[0] * momentum[name] + (1 - betas[0]) * gradient)
                weights[name].sub_(rate * (sign + decays[name] * weights[name]))
                momentum[name] = betas[1] * momentum[name] + (1 - betas[1]) * gradient

        return lion
    hidden = {
        name for name, w in weights.items() if config.name == Optimizer.muon and w.dim() == 2 and "layers" in name
    }
    groups = [{"params": [w], "weight_decay": decays[n]} for n, w in weights.items() if n not in hidden]
    match config.name:
        case Optimizer.adamw | Optimizer.muon:
            optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, 0.0, betas, config.eps)]
        case Optimizer.adam:
            optimizers = [torch.optim.Adam(groups, 0.0, betas, config.eps)]
        case Optimizer.sgd:
            optimizers = [torch.optim.SGD(groups, 0.0, config.momentum)]
        case Optimizer.rmsprop:
            optimizers = [torch.optim.RMSprop(groups, 0.0, betas[1], config.eps, momentum=config.momentum)]
    if hidden:
        matrices = [weights[name] for name in weights if name in hidden]
        settings = {"weight_decay": config.weight_decay, "momentum": config.momentum}
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings))

    def step(rate: float, gradients: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            weights[name].grad = gradient
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    return step


@pytest.mark.parametrize("name", cases_of(NAMES))
def test_curve_is_that_of_a_bare_loop(name: str, trained: Callable[[str], Trained]) -> None:
    """Within four times what float32 itself costs the bare loop against float64, plus rounding of the loss."""
    case = trained(name)
    truth, plain = case.bare(torch.float64), case.bare(torch.float32)
    eps = 4 * torch.finfo(torch.float32).eps * max(truth.losses)
    noise = max(abs(a - b) for a, b in zip(plain.losses, truth.losses, strict=True))
    worst = max(abs(a - b) for a, b in zip(case.result["losses"], truth.losses, strict=True))
    print(f"{name}: worst {worst:.2e}, noise {noise:.2e}, first {truth.losses[0]:.3f}, last {truth.losses[-1]:.3f}")
    assert worst <= 4 * noise + eps
    assert truth.losses[-1] < truth.losses[0] - 100 * (4 * noise + eps)
    last_noise = abs(plain.validation_loss - truth.validation_loss)
    assert abs(case.result["validation_loss"] - truth.validation_loss) <= 4 * max(noise, last_noise) + eps


@pytest.mark.parametrize("name", cases_of(name for name in NAMES if name.startswith(("ema", "lora"))))
def test_the_average_is_what_is_saved_and_training_goes_on_without_it(
    name: str, trained: Callable[[str], Trained]
) -> None:
    case = trained(name)
    assert case.result["unchanged"]
    truth, plain = case.bare(torch.float64).weights, case.bare(torch.float32).weights
    assert case.weights.keys() == truth.keys()
    # of all weights, which take steps of one size: that of a single tensor is one draw, and may be a small one
    noise = max((plain[key] - truth[key]).abs().max().item() for key in truth)
    for key, weight in case.weights.items():
        assert (weight - truth[key]).abs().max() <= 8 * noise + 4 * torch.finfo(torch.float32).eps * weight.abs().max()


@pytest.mark.parametrize("name", cases_of(RESUMED))
def test_a_resumed_run_goes_on_bit_for_bit(name: str, trained: Callable[[str], Trained]) -> None:
    result = trained(name).result
    assert result["resumed"] == result["losses"][RESUMED[name] :]
    assert result["resumed_alike"]


@pytest.mark.parametrize("name", cases_of(["frozen-1", "frozen-3"]))
def test_frozen_weights_keep_every_bit(name: str, trained: Callable[[str], Trained]) -> None:
    case = trained(name)
    start = Decoder(TINY, VOCAB_SIZE)
    initialize(start, case.run.seed)
    kept = {key for key, value in start.named_parameters() if torch.equal(value, case.weights[key])}
    assert kept == {key for key in case.weights if matches(key, FROZEN)}
    assert case.result["trainable_parameters"] == sum(
        value.numel() for key, value in case.weights.items() if key not in kept
    )


@pytest.mark.parametrize("name", cases_of(["lora-1", "lora-3"]))
def test_only_adapters_and_replaced_modules_change(name: str, trained: Callable[[str], Trained]) -> None:
    case = trained(name)
    assert case.run.model.initial_weights is not None
    start = dict(load_decoder(case.run.model.initial_weights).named_parameters())
    kept = {key for key, value in start.items() if torch.equal(value, case.weights[key])}
    assert kept == start.keys() - {"model.norm.weight"}
    assert case.result["parameters"] == sum(value.numel() for value in start.values())
    assert case.result["trainable_parameters"] == 32 + 2 * 4 * (64 + 48 + 48 + 64)
