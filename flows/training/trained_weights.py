"""How many numbers a run trains, and what its optimizer keeps for them, from names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from flows.config.optimizer import Optimizer
from flows.config.training import TrainConfig, TrainingRun
from flows.model.arithmetic import weight_shapes
from flows.model.config_json import counted_shape

HEAD = "lm_head"


@dataclass(frozen=True)
class TrainedWeights:
    """Counts of numbers, over all ranks."""

    all: int
    """The model's own weights, and adapters."""
    trained: int
    """Those that have a gradient."""
    frozen_matrices: int
    """Weights that tokens are multiplied with and that have no gradient."""
    optimizer_states: int
    """What the update rule keeps between steps, an average of the weights included."""


def trained_weights(run: TrainingRun, vocab_size: int) -> TrainedWeights:
    """Counts for one training run; `flows.training.trainable` chooses the same weights in the model itself."""
    shapes = weight_shapes(counted_shape(run.model), vocab_size)
    lora = run.train.lora
    trained = {name: shape for name, shape in shapes.items() if _is_trained(name, run.train)}
    adapters = dict(_adapters(shapes, run)) if lora.enabled else {}
    frozen = [shape for name, shape in shapes.items() if name not in trained and len(shape) >= 2]
    updated = trained | adapters
    states = sum(_states(name, shape, run) * math.prod(shape) for name, shape in updated.items())
    count = _count(updated.values())
    return TrainedWeights(
        all=_count(shapes.values()) + _count(adapters.values()),
        trained=count,
        frozen_matrices=_count(frozen),
        optimizer_states=states + (count if run.train.ema_decay > 0 else 0),
    )


def _is_trained(name: str, train: TrainConfig) -> bool:
    if train.lora.enabled:
        parts = name.split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(fnmatchcase(module, pattern) for module in modules for pattern in train.lora.replaced)
    wanted = not train.trainable or any(fnmatchcase(name, pattern) for pattern in train.trainable)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in train.freeze)


def _adapters(shapes: dict[str, tuple[int, ...]], run: TrainingRun) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Both matrices of each adapter, by name; embeddings are no linear modules, a tied head is one."""
    linear = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    linear[HEAD] = linear.pop("model.embed_tokens") if HEAD not in linear else linear[HEAD]
    linear.pop("model.embed_tokens", None)
    for module, (out, into) in linear.items():
        replaced = any(fnmatchcase(module, pattern) for pattern in run.train.lora.replaced)
        if not replaced and any(fnmatchcase(module, pattern) for pattern in run.train.lora.targets):
            yield f"{module}.lora_A.weight", (run.train.lora.rank, into)
            yield f"{module}.lora_B.weight", (out, run.train.lora.rank)


def _states(name: str, shape: tuple[int, ...], run: TrainingRun) -> int:
    """Numbers that the update rule keeps for one number of this weight."""
    config = run.train.optimizer
    match config.name:
        case Optimizer.adamw | Optimizer.adam:
            return 2
        case Optimizer.lion:
            return 1
        case Optimizer.sgd:
            return int(config.momentum > 0)
        case Optimizer.rmsprop:
            return 1 + int(config.momentum > 0)
        case Optimizer.muon:  # AdamW for embeddings, the head and vectors
            return 1 if len(shape) == 2 and "embed_tokens" not in name and not name.startswith(HEAD) else 2


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
