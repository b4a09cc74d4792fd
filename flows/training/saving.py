"""What a training run leaves: a model directory whose adapters are merged, and the adapters beside it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flows.model.checkpoint import save_decoder
from flows.training.job import TrainingJob
from flows.training.lora import ADAPTER_DIR, merged, save_adapter
from flows.training.trainable import matches


def save_trained(job: TrainingJob, index: Mapping[str, int], weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Writes the best model so far; the weights that are in it.

    Args:
        job: Whose `best_dir` it goes to.
        index: Of the tokens: `vocab_size`, `eos_token_id`.
        weights: Whole weights by name, adapters included.
    """
    lora = job.run.train.lora
    job.best_dir.mkdir(parents=True, exist_ok=True)
    if lora.enabled:
        replaced = {name for name in weights if _is_replaced(name, lora.replaced)}
        save_adapter(job.best_dir / ADAPTER_DIR, weights, replaced, lora)
        weights = merged(weights, lora)
    save_decoder(
        job.best_dir, weights, job.run.model, index["vocab_size"], job.run.sequence_length, index["eos_token_id"]
    )
    return weights


def _is_replaced(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the weight belongs to a module that matches, or to one below it."""
    parts = name.split(".")
    return any(matches(".".join(parts[:count]), patterns) for count in range(1, len(parts)))
