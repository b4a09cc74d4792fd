"""Two ranks hand one training state through the ZeRO stages: `python -m tests.training.all_layouts <directory>`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from flows.config.engine import EngineConfig, Precision
from flows.config.model import ModelConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.training import TrainingRun
from flows.launcher import follow_parent
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize
from flows.training.batches import micro_batches
from flows.training.checkpoint import Checkpoints
from flows.training.consolidation import consolidate
from flows.training.engine import build_engine, close_engine, set_learning_rate, start_process_group, train_step
from flows.training.made_up_tokens import MadeUpTokens
from flows.training.objectives import LossModule, cross_entropy
from flows.training.weight_parts import named_parts
from tests.training.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, tiny_run

CHAINS = {"adamw": [0, 1, 2, 3, 0, 3, 2, 1, 0], "sgd": [1, 3, 0], "bf16": [1, 3, 2]}
"""Kind of run, and the ZeRO stages that its state goes through."""
UPDATES = 3


def run_of(kind: str, zero_stage: int) -> TrainingRun:
    precision = Precision.bf16 if kind == "bf16" else Precision.fp32
    return tiny_run(
        ranks=2,
        micro_batch_size=2,
        optimizer=OptimizerConfig(name=Optimizer.sgd if kind == "sgd" else Optimizer.adamw, learning_rate=1e-2),
        engine=EngineConfig(zero_stage=zero_stage, precision=precision),
    )


def main(directory: Path) -> None:
    """Leaves `<kind>/<position in the chain>` with a checkpoint and consolidated weights, and losses.json."""
    follow_parent()
    start_process_group()
    dataset = MadeUpTokens(VOCAB_SIZE, SEQUENCE_LENGTH, count=64)
    losses: dict[str, list[float]] = {}
    for kind, chain in CHAINS.items():
        losses[kind] = []
        for position, zero_stage in enumerate(chain):
            run = run_of(kind, zero_stage)
            model = Decoder(run.model, VOCAB_SIZE)
            initialize(model, seed=position)  # so that whatever is not loaded shows
            engine = build_engine(LossModule(model, cross_entropy), run)
            set_learning_rate(engine, 1e-2)
            weights = named_parts(engine)
            before = Checkpoints(directory / kind / str(max(0, position - 1)), engine, weights, run.train)
            state = before.load()
            while state.step < UPDATES:
                train_step(engine, micro_batches(dataset, run, state.step, "cpu"), state.step)
                state.step += 1
            after = Checkpoints(directory / kind / str(position), engine, weights, run.train)
            after.save(state)
            best = directory / kind / str(position) / "best"

            def save(
                weights: Mapping[str, Tensor], best: Path = best, config: ModelConfig = run.model
            ) -> Mapping[str, Tensor]:
                save_decoder(best, weights, config, VOCAB_SIZE, SEQUENCE_LENGTH, 0)
                return weights

            consolidate(engine, best, save)
            losses[kind].append(train_step(engine, micro_batches(dataset, run, state.step, "cpu"), state.step))
            after.wait()
            if (kind, position) != (next(reversed(CHAINS)), len(chain) - 1):
                engine.destroy()
    if dist.get_rank() == 0:
        (directory / "losses.json").write_text(json.dumps(losses))
    close_engine(engine)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
