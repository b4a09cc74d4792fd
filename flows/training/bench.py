"""Training speed of the engine and its loop against a bare torch loop of the same model and batch."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from flows.config.engine import Device, EngineConfig
from flows.config.launcher import LauncherConfig
from flows.config.model import ModelConfig
from flows.config.tracking import TrackingConfig
from flows.config.training import Objective, TrainConfig, TrainingRun
from flows.launcher import Heartbeat
from flows.model.decoder import Decoder, initialize
from flows.training.made_up_tokens import MadeUpTokens

VOCAB_SIZE = 4096
SEQUENCES = 1024
ROUNDS = 8
STEPS_PER_ROUND = 4


def run() -> None:
    """Prints tokens per second of both, and their ratio, for each ZeRO stage; one rank, rounds taken in turns.

    Before that it checks that both loops give the same losses.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    from flows.training.engine import start_process_group

    start_process_group()
    for zero_stage in (0, 1, 2, 3):
        _compare(zero_stage)
    torch.distributed.destroy_process_group()


def _compare(zero_stage: int) -> None:
    training_run = _training_run(zero_stage)
    step_ours, step_bare = _our_loop(training_run), _bare_loop(training_run)
    differences = [abs(step_ours() - step_bare()) for _ in range(STEPS_PER_ROUND)]
    if max(differences) > 1e-3:
        raise AssertionError(f"ZeRO {zero_stage} does not train like the bare loop: losses differ by {differences}")
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(ROUNDS):
        for name, step in (("ours", step_ours), ("bare", step_bare)):
            started = time.perf_counter()
            for _ in range(STEPS_PER_ROUND):
                step()
            seconds[name].append((time.perf_counter() - started) / STEPS_PER_ROUND)
    tokens = training_run.train.global_batch_size * training_run.sequence_length
    ours, bare = (tokens / statistics.median(seconds[name]) for name in ("ours", "bare"))
    ratio = statistics.median(b / o for o, b in zip(seconds["ours"], seconds["bare"], strict=True))
    print(f"ZeRO {zero_stage}: {ours:8.0f} tokens/s, bare loop {bare:8.0f}, ratio {ratio:.3f}", flush=True)


def _training_run(zero_stage: int) -> TrainingRun:
    return TrainingRun(
        objective=Objective.cross_entropy,
        model=ModelConfig(),
        train=TrainConfig(max_steps=10_000, warmup_steps=0),
        engine=EngineConfig(zero_stage=zero_stage, device=Device.auto),
        launcher=LauncherConfig(),
        tracking=TrackingConfig(),
        sequence_length=256,
        seed=0,
    )


def _model(training_run: TrainingRun) -> Decoder:
    model = Decoder(training_run.model, VOCAB_SIZE)
    initialize(model, training_run.seed)
    return model


def _our_loop(training_run: TrainingRun) -> Callable[[], float]:
    from flows.training.batches import micro_batches
    from flows.training.engine import build_engine, set_learning_rate
    from flows.training.loop import train_step
    from flows.training.objectives import LossModule, cross_entropy
    from flows.training.schedules import learning_rate

    engine = build_engine(LossModule(_model(training_run), cross_entropy), training_run)
    dataset = MadeUpTokens(VOCAB_SIZE, training_run.sequence_length, SEQUENCES)
    log_dir = Path(tempfile.mkdtemp())
    heartbeat = Heartbeat(log_dir)
    steps = iter(range(training_run.train.max_steps))

    def step() -> float:
        number = next(steps)
        set_learning_rate(engine, learning_rate(training_run.train, number))
        loss = train_step(engine, micro_batches(dataset, training_run, number, engine.device), number)
        heartbeat.beat()
        return loss

    return step


def _bare_loop(training_run: TrainingRun) -> Callable[[], float]:
    """What a person would write: same model, batches, accumulation, clipping and fused AdamW."""
    from flows.training.objectives import cross_entropy
    from flows.training.optimizers import build_optimizer
    from flows.training.schedules import learning_rate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _model(training_run).to(device)
    optimizer = build_optimizer(model, training_run.train.optimizer)
    dataset = MadeUpTokens(VOCAB_SIZE, training_run.sequence_length, SEQUENCES)
    train = training_run.train
    steps: Iterator[int] = iter(range(train.max_steps))

    def step() -> float:
        number = next(steps)
        order = dataset.order(number * train.global_batch_size, train.global_batch_size, training_run.seed)
        total = 0.0
        for first in range(0, train.global_batch_size, train.micro_batch_size):
            rows = order[first : first + train.micro_batch_size]
            tokens = torch.from_numpy(np.stack([dataset[int(i)] for i in rows])).to(device)
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
            loss = cross_entropy(model(inputs), inputs, targets) / (train.global_batch_size * targets.shape[1])
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, number)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


if __name__ == "__main__":
    run()
