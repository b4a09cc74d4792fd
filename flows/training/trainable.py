# torch.Tensor.register_hook is untyped:
# mypy: disable-error-code="no-untyped-call"
"""Which weights are trained: all, those that patterns name, or adapters beside them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import cast

from torch import Tensor, nn

from flows.config.checks import ConfigError
from flows.config.training import TrainConfig
from flows.model.decoder import Decoder
from flows.training.lora import ADAPTERS, add_adapters
from flows.training.optimizers import parameter_groups


def choose_weights(model: nn.Module, train: TrainConfig, seed: int, pipeline_stages: int = 1) -> None:
    """Freezes what is not trained, by `requires_grad`, and puts adapters in, the same ones on every rank.

    Args:
        model: With Hugging Face's weight names; on the meta device, to check patterns only.
        train: What to train.
        seed: Of the adapters' initial weights.
        pipeline_stages: Ranks that its layers are shared out among.

    Raises:
        ConfigError: A pattern matches nothing, nothing is left to train, or stages would train unlike weights.
    """
    names = [name for name, _ in model.named_parameters()]
    for field in ("trainable", "freeze"):
        check_patterns(f"train.{field}", getattr(train, field), names, "weight")
    if train.lora.enabled:
        for field in ("targets", "replaced"):
            kinds = nn.Linear if field == "targets" else nn.Module
            modules = [name for name, module in model.named_modules() if name and isinstance(module, kinds)]
            check_patterns(f"train.lora.{field}", getattr(train.lora, field), modules, "module")
        add_adapters(model, train.lora, seed)
        _check_stages(model, train, pipeline_stages)
        return
    for name, parameter in model.named_parameters():
        wanted = not train.trainable or matches(name, train.trainable)
        parameter.requires_grad_(wanted and not matches(name, train.freeze))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"train.freeze={list(train.freeze)} leaves none of {len(names)} weights to train. Freeze fewer."
        )
    _check_stages(model, train, pipeline_stages)
    frozen = [
        name for name, weight in model.named_parameters() if becomes_sparse(name, weight) and not weight.requires_grad
    ]
    if train.sparsify.sparsity and frozen:
        raise ConfigError(
            f"train.sparsify.sparsity={train.sparsify.sparsity:g} makes zeros in every matrix of the blocks, and "
            f"{len(frozen)} of them, {frozen[0]} among them, would keep every bit (train.trainable="
            f"{list(train.trainable)}, train.freeze={list(train.freeze)}). Train all of them, or set "
            "train.sparsify.sparsity=0."
        )


def becomes_sparse(name: str, weight: Tensor) -> bool:
    """Whether a weight is one of those that `train.sparsify` sets to zero by and by: the matrices of the blocks."""
    return name.startswith("model.layers.") and weight.dim() == 2


def _check_stages(model: nn.Module, train: TrainConfig, stages: int) -> None:
    """Raises `ConfigError` where a layer, and so perhaps a stage, trains no weights of a decay that others train.

    DeepSpeed 0.19 adds up gradient norms over stages group by group, and would wait for ever.
    """
    if stages == 1:
        return
    groups = parameter_groups(model, train.optimizer)
    decays = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    for number, layer in enumerate(cast(Decoder, model).model.layers):
        missing = {*decays.values()} - {decays[id(weight)] for weight in layer.parameters() if id(weight) in decays}
        if missing:
            raise ConfigError(
                f"engine.pipeline_stages={stages} needs weights of the same kinds to train in every layer, and "
                f"model.layers.{number} has none to train with a decay of {min(missing):g}, as others have (matrices "
                f"decay by {train.optimizer.weight_decay:g}, norms and biases by 0): stages would wait for each other "
                "for ever. Train matrices in all layers or in none, and norms likewise (train.trainable, train.freeze, "
                "train.lora.replaced), or set engine.pipeline_stages=1."
            )


def keep_zeros(model: nn.Module) -> None:
    """Has matrix weights that are zero now stay zero: their gradient is zero from now on, whatever shares the work.

    No update rule but Muon's moves a weight without a gradient, weight decay included.
    """
    for parameter in model.parameters():
        alive = parameter.detach() != 0
        if parameter.dim() == 2 and not alive.all():
            parameter.register_hook(partial(_where, alive))


def _where(alive: Tensor, gradient: Tensor) -> Tensor:
    return gradient * alive.to(gradient.device)


def check_patterns(field: str, patterns: Sequence[str], names: Collection[str], kind: str) -> None:
    """Raises `ConfigError` for a pattern that matches none of the names; shows those that are spelt alike.

    Args:
        field: Dotted name of the setting.
        patterns: Globs that were given there.
        names: What there is in the model.
        kind: What the names are of: `weight` or `module`, say.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.3) or sorted(names)[:3]
            raise ConfigError(
                f"{field}={pattern} matches none of the model's {len(names)} {kind}s. "
                f"Set a pattern for names such as {', '.join(near)}."
            )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the glob patterns fits the whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def count_weights(model: nn.Module) -> dict[str, int]:
    """`parameters` of the model itself, and how many numbers are trained: `trainable_parameters`, adapters included."""
    sizes = {name: math.prod(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        "parameters": sum(size for name, size in sizes.items() if not name.endswith(ADAPTERS)),
        "trainable_parameters": sum(sizes[name] for name in trained),
    }
