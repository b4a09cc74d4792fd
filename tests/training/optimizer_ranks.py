"""One start of ranks that trains many small cases in turn: `python -m tests.training.optimizer_ranks <cases.json>`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.config import from_json
from flows.config.training import TrainingRun
from flows.launcher import Heartbeat, follow_parent


@dataclass(frozen=True)
class Cases:
    tokens_dir: Path
    output_dir: Path
    runs: dict[str, TrainingRun]
    resumed_at: dict[str, int]
    """Cases that are also resumed, by a second engine, from a checkpoint of this step."""


def main(path: Path) -> None:
    follow_parent()
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from flows.data.packed import PackedDataset
    from flows.model.checkpoint import load_initial_weights
    from flows.model.decoder import Decoder, initialize
    from flows.training.batches import micro_batches
    from flows.training.checkpoint import Checkpoints, TrainingState
    from flows.training.engine import build_engine, set_learning_rate, start_process_group, train_step
    from flows.training.loop import evaluate
    from flows.training.objectives import LossModule, cross_entropy
    from flows.training.schedules import ema_decay, learning_rate
    from flows.training.trainable import choose_weights, count_weights
    from flows.training.weight_average import averaged_weights, set_ema_decay
    from flows.training.weight_parts import gather_weights

    cases = from_json(Cases, path.read_text())
    vocab_size = json.loads((cases.tokens_dir / "index.json").read_text())["vocab_size"]
    start_process_group()
    heartbeat = Heartbeat(cases.output_dir)

    def engine_of(run: TrainingRun) -> Any:
        model = Decoder(run.model, vocab_size)
        if run.model.initial_weights:
            load_initial_weights(model, run.model.initial_weights)
        else:
            initialize(model, run.seed)
        choose_weights(model, run.train, run.seed)
        return build_engine(LossModule(model, cross_entropy), run)

    def checkpoints_of(engine: Any, name: str, run: TrainingRun) -> Checkpoints:
        directory = cases.output_dir / "checkpoints" / name
        return Checkpoints(directory, engine, dict(engine.module.model.named_parameters()), run)

    def losses_of(engine: Any, run: TrainingRun, steps: range) -> list[float]:
        dataset = PackedDataset(cases.tokens_dir, "train", run.sequence_length)
        losses = []
        for step in steps:
            set_learning_rate(engine, learning_rate(run.train, step))
            set_ema_decay(engine, ema_decay(run.train, step))
            losses.append(train_step(engine, micro_batches(dataset, run, step, engine.device), step))
            heartbeat.beat()
        return losses

    for name, run in cases.runs.items():
        engine = engine_of(run)
        split = cases.resumed_at.get(name, 0)
        result: dict[str, Any] = {"losses": losses_of(engine, run, range(split))}
        if split:
            saved = checkpoints_of(engine, name, run)
            saved.save(TrainingState(split))
            saved.wait()
        result["losses"] += losses_of(engine, run, range(split, run.train.max_steps))
        before = gather_weights(engine)
        validation = PackedDataset(cases.tokens_dir, "validation", run.sequence_length)
        with averaged_weights(engine, run.train.ema_decay > 0):
            weights = gather_weights(engine)
            result["validation_loss"] = evaluate(engine, validation, run, heartbeat)
        after = gather_weights(engine)
        result["unchanged"] = all(torch.equal(before[key], after[key]) for key in before)
        result |= count_weights(engine.module)
        if split:
            again = engine_of(run)
            assert checkpoints_of(again, name, run).load().step == split
            result["resumed"] = losses_of(again, run, range(split, run.train.max_steps))
            with averaged_weights(again, run.train.ema_decay > 0):
                resumed = gather_weights(again)
            result["resumed_alike"] = all(torch.equal(weights[key], resumed[key]) for key in weights)
        if dist.get_rank() == 0:
            save_file(weights, cases.output_dir / f"{name}.safetensors")
            (cases.output_dir / f"{name}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
