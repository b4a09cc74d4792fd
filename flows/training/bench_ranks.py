"""What one rank of the training benchmark does: the engine and a bare torch loop in turns, on the same batches."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from flows.artifact import write_json_atomically
from flows.config import from_json
from flows.config.model import Kernels
from flows.config.training import TrainingRun
from flows.launcher import Heartbeat, follow_parent
from flows.model.decoder import Decoder, initialize
from flows.training.batches import micro_batches
from flows.training.bench import MICRO_STEP_SEQUENCES, BenchJob
from flows.training.engine import build_engine, close_engine, set_learning_rate, start_process_group, train_step
from flows.training.made_up_tokens import MadeUpTokens
from flows.training.objectives import LossModule, cross_entropy
from flows.training.optimizers import build_optimizer
from flows.training.schedules import learning_rate

VOCAB_SIZE = 4096
SEQUENCES = 1024
COMPARED_STEPS = 3
Step = Callable[[], float]


def measure(job: BenchJob) -> None:
    """Writes result.json: tokens per second of both loops, their ratio, memory per rank, difference of losses."""
    start_process_group()
    heartbeat = Heartbeat(job.directory)
    leads = dist.get_rank() == 0
    engine, ours = _engine_loop(job.run)
    bare = _bare_loop(job.run) if leads else None
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    difference = 0.0
    for number in range(COMPARED_STEPS + job.rounds):
        dist.barrier()
        started = time.perf_counter()
        loss = ours()
        took = time.perf_counter() - started
        if bare is not None:  # other ranks wait: it has the machine to itself
            torch.set_num_threads(len(os.sched_getaffinity(0)))
            started = time.perf_counter()
            difference = max(difference, abs(loss - bare()))
            if number >= COMPARED_STEPS:
                seconds["ours"].append(took)
                seconds["bare"].append(time.perf_counter() - started)
            torch.set_num_threads(threads)
        heartbeat.beat()
    peaks: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(peaks, _peak_mib())
    if leads:
        tokens = job.run.train.global_batch_size * job.run.sequence_length
        result = {
            "tokens_per_s": tokens / statistics.median(seconds["ours"]),
            "ratio": statistics.median(b / o for o, b in zip(seconds["ours"], seconds["bare"], strict=True)),
            "peak_mib": max(peaks),
            "loss_difference": difference,
        }
        write_json_atomically(job.directory / "result.json", result)
    close_engine(engine)


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _model(run: TrainingRun) -> Decoder:
    model = Decoder(run.model, VOCAB_SIZE)
    initialize(model, run.seed)
    return model


def _engine_loop(run: TrainingRun) -> tuple[object, Step]:
    engine = build_engine(LossModule(_model(run), cross_entropy), run)
    dataset = MadeUpTokens(VOCAB_SIZE, run.sequence_length, SEQUENCES)
    steps = iter(range(run.train.max_steps))

    def step() -> float:
        number = next(steps)
        set_learning_rate(engine, learning_rate(run.train, number))
        return train_step(engine, micro_batches(dataset, run, number, engine.device), number)

    return engine, step


def _bare_loop(run: TrainingRun) -> Step:
    """What a person would write: same model, batches, accumulation, clipping and fused AdamW; one process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _model(run).to(device)
    optimizer = build_optimizer(model, run.train.optimizer, Kernels.reference.value)
    dataset = MadeUpTokens(VOCAB_SIZE, run.sequence_length, SEQUENCES)
    train = run.train
    steps = iter(range(train.max_steps))

    def step() -> float:
        number = next(steps)
        order = dataset.order(number * train.global_batch_size, train.global_batch_size, run.seed)
        total = 0.0
        for first in range(0, train.global_batch_size, MICRO_STEP_SEQUENCES):
            rows = order[first : first + MICRO_STEP_SEQUENCES]
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
    follow_parent()
    measure(from_json(BenchJob, Path(sys.argv[1]).read_text()))
