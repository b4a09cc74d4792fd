"""Training speed of every engine against a bare torch loop of the same model and batches.

    python -m flows.training.bench                      one rank per ZeRO stage, two ranks of two kinds; 2.5 minutes
    python -m flows.training.bench --all                every engine on one, two and four ranks
    python -m flows.training.bench --all --rounds 1     whether all of them run, in no time worth a number

The bare loop is one process with all cores (on CUDA one GPU); it runs in turns with the engine, and its losses are
compared at each step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flows.config import to_json
from flows.config.engine import EngineConfig, Offload, Precision
from flows.config.launcher import LauncherConfig
from flows.config.model import ModelConfig
from flows.config.tracking import TrackingConfig
from flows.config.training import Objective, TrainConfig, TrainingRun
from flows.launcher import launch_ranks

MICRO_STEP_SEQUENCES = 8
"""In one forward-backward of all ranks together, and of the bare loop."""
ROUNDS = 6
"""Timed steps of each loop."""
ALLOWED_DIFFERENCE = {Precision.fp32: 1e-3, Precision.bf16: 0.05}
"""Of losses of about 8 nats, in the first nine steps: above it there is nothing worth timing."""


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """What the ranks of one row are told."""

    run: TrainingRun
    directory: Path
    """Where logs and result.json go."""
    rounds: int
    """Timed steps of each loop, after those that are only compared."""


@dataclass(frozen=True)
class Row:
    """An engine and a number of ranks."""

    name: str
    ranks: int
    engine: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


SHORT = [
    *[Row(f"ZeRO-{stage}", 1, {"zero_stage": stage}) for stage in (0, 1, 2, 3)],
    Row("ZeRO-1", 2),
    Row("pipeline 2", 2, {"pipeline_stages": 2}),
]
EXPERTS = {"num_experts": 4, "intermediate_size": 344, "router_aux_loss_coef": 0.0}
"""Without the loss that keeps experts busy, which the bare loop has not."""
MORE = [
    Row("ZeRO-1 bf16", 1, {"precision": Precision.bf16}),
    Row("ZeRO-1 recomputing", 1, {"activation_checkpointing": True}),
    Row("ZeRO-1 compiled", 1, {"compile": True}),
    Row("ZeRO-3 offloaded", 1, {"zero_stage": 3, "offload_optimizer": Offload.cpu, "offload_parameters": Offload.cpu}),
    *[Row(f"ZeRO-{stage}", 2, {"zero_stage": stage}) for stage in (0, 2, 3)],
    Row("tensor 2", 2, {"tensor_parallel_size": 2}),
    Row("sequence 2", 2, {"sequence_parallel_size": 2}),
    Row("ZeRO-1 bf16", 2, {"precision": Precision.bf16}),
    Row("ZeRO-1 recomputing", 2, {"activation_checkpointing": True}),
    Row("ZeRO-1 compiled", 2, {"compile": True}),
    Row("ZeRO-3 offloaded", 2, {"zero_stage": 3, "offload_optimizer": Offload.cpu, "offload_parameters": Offload.cpu}),
    Row("experts 2", 2, {"expert_parallel_size": 2}, EXPERTS),
    *[Row(f"ZeRO-{stage}", 4, {"zero_stage": stage}) for stage in (0, 1, 2, 3)],
    Row("pipeline 2", 4, {"pipeline_stages": 2}),
    Row("pipeline 4", 4, {"pipeline_stages": 4}),
    Row("tensor 2", 4, {"tensor_parallel_size": 2}),
    Row("tensor 4", 4, {"tensor_parallel_size": 4}),
    Row("sequence 2", 4, {"sequence_parallel_size": 2}),
    Row("sequence 4", 4, {"sequence_parallel_size": 4}),
    Row("experts 4", 4, {"expert_parallel_size": 4}, EXPERTS),
    Row("tensor 2 sequence 2", 4, {"tensor_parallel_size": 2, "sequence_parallel_size": 2}),
    Row("pipeline 2 sequence 2", 4, {"pipeline_stages": 2, "sequence_parallel_size": 2}),
]


def main(rows: list[Row], rounds: int) -> None:
    """Prints the table, a line as soon as it is measured.

    Raises:
        AssertionError: An engine does not train like the bare loop.
    """
    print(
        f"{'engine':24}{'ranks':>6}{'tokens/s':>10}{'of bare':>9}{'MiB per rank':>14}{'loss difference':>17}",
        flush=True,
    )
    for row in rows:
        run = _training_run(row)
        result = _measured(run, rounds)
        if result["loss_difference"] > ALLOWED_DIFFERENCE[run.engine.precision]:
            raise AssertionError(f"{row} does not train like the bare loop: {result}")
        print(
            f"{row.name:24}{row.ranks:6}{result['tokens_per_s']:10.0f}{result['ratio']:9.3f}"
            f"{result['peak_mib']:14.0f}{result['loss_difference']:17.1e}",
            flush=True,
        )


def _measured(run: TrainingRun, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        job = BenchJob(run=run, directory=Path(directory), rounds=rounds)
        path = job.directory / "run.json"
        path.write_text(to_json(job))
        os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
        launch_ranks("flows.training.bench_ranks", path, run.launcher, job.directory)
        result: dict[str, float] = json.loads((job.directory / "result.json").read_text())
    return result


def _training_run(row: Row) -> TrainingRun:
    engine = EngineConfig(**row.engine)
    return TrainingRun(
        objective=Objective.cross_entropy,
        model=ModelConfig(num_key_value_heads=4, **row.model),
        train=TrainConfig(
            max_steps=100,
            warmup_steps=0,
            global_batch_size=2 * MICRO_STEP_SEQUENCES,
            micro_batch_size=MICRO_STEP_SEQUENCES * engine.ranks_per_replica // row.ranks,
        ),
        engine=engine,
        launcher=LauncherConfig(num_ranks=row.ranks),
        tracking=TrackingConfig(tensorboard=False),
        sequence_length=256,
        seed=0,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every engine on one, two and four ranks")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed steps of each loop; {ROUNDS} if not given")
    words = parser.parse_args()
    main(SHORT + (MORE if words.all else []), max(1, words.rounds))
