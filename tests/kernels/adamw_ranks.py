"""One rank that trains small cases with AdamW's kernel and without, and writes down what each gave."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flows.config.engine import Precision
from flows.config.model import Kernels
from flows.config.training import TrainingRun


@dataclass(frozen=True)
class Work:
    directory: Path
    """Where to write `rank-<n>.pt`."""
    device: str
    runs: dict[str, TrainingRun]
    tokens: Tensor
    """int64 [steps, micro batches of all ranks, 1, length + 1]."""
    vocab_size: int
    saved: str | None = None
    """Case that saves a checkpoint."""
    resumed: str | None = None
    """Case that also goes on from it."""


def main(work: Work, rank: int, ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "DS_ACCELERATOR": work.device,
    }  # fmt: skip
    torch.set_num_threads(1)
    from flows.model.decoder import Decoder, initialize
    from flows.training.batches import Batch
    from flows.training.checkpoint import Checkpoints, TrainingState
    from flows.training.engine import build_engine, close_engine, start_process_group, train_step
    from flows.training.fragments import held_fragments
    from flows.training.gradient_clipping import gradient_measures
    from flows.training.objectives import LossModule, cross_entropy
    from flows.training.weight_parts import gather_weights
    from kernels.dispatch import INTERPRETED

    if INTERPRETED:
        from kernels.interpreter import mend_interpreter

        mend_interpreter()
    start_process_group()

    def engine_of(run: TrainingRun) -> Any:
        model = Decoder(replace(run.model, kernels=Kernels.reference), work.vocab_size)  # the optimizer is tested here
        initialize(model, run.seed)
        return build_engine(LossModule(model, cross_entropy), run)

    def step(engine: Any, number: int) -> float:
        mine = work.tokens[number, rank::ranks].to(engine.device)
        counted = torch.tensor(float(work.tokens.shape[3] - 1), device=engine.device)
        return train_step(engine, [Batch(rows[:, :-1], rows[:, 1:], counted) for rows in mine], number)

    def held(engine: Any) -> dict[str, Tensor]:
        fragments = held_fragments(engine, engine.module.model.named_parameters())
        return {f"{f.name} {f.start} {key}": t.cpu().clone() for f in fragments for key, t in f.tensors()}

    def checkpoints_of(engine: Any, run: TrainingRun) -> Checkpoints:
        return Checkpoints(work.directory / "saved", engine, dict(engine.module.model.named_parameters()), run)

    results: dict[str, Any] = {}
    for name, run in work.runs.items():
        engine = engine_of(run)
        result: dict[str, Any] = {"losses": [], "measures": []}
        for number in range(len(work.tokens)):
            result["losses"].append(step(engine, number))
            result["measures"].append(gradient_measures(engine))
        result["weights"], result["held"] = gather_weights(engine), held(engine)
        results[name] = result
        if name == work.saved:
            checkpoints = checkpoints_of(engine, run)
            checkpoints.save(TrainingState(len(work.tokens)))
            checkpoints.wait()
            result["next"] = step(engine, 0)
            result["after"] = held(engine)
        if name == work.resumed:
            again = engine_of(run)
            assert checkpoints_of(again, run).load().step == len(work.tokens)
            result["loaded"] = held(again)
            result["next"] = step(again, 0)
            result["after"] = held(again)
        if run.engine.precision == Precision.fp32 and run.model.kernels == "triton":
            weight = next(engine.module.model.parameters())
            hook = weight.register_hook(lambda gradient: gradient * (torch.inf if rank == ranks - 1 else 1))
            step(engine, 0)
            hook.remove()
            result["held after infinity"], result["infinite"] = held(engine), gradient_measures(engine)
            step(engine, 0)
            result["held after all"], result["finite again"] = held(engine), gradient_measures(engine)
    torch.save(results, work.directory / f"rank-{rank}.pt")
    close_engine(engine)


if __name__ == "rank":
    main(**globals()["arguments"])
