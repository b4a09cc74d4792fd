# Calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""What quantizing one matrix alone does to a model's predictions, and which matrices to quantize within a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from flows.compression.calibration import Calibration
from flows.compression.candidate import replace_layer
from flows.compression.coded_matrix import Coded, make_layer
from flows.compression.compressed_tensors_layout import stored_tensors
from flows.config.checks import require
from flows.config.quantize import QuantizeConfig, Scheme
from flows.data.packed import IGNORED
from flows.model.decoder import Decoder


@dataclass(frozen=True)
class Choice:
    """One way to keep a matrix."""

    scheme: Scheme | None
    """None = in floating point."""
    bytes: int
    kl: float
    """Nats per token that it alone makes the model's predictions diverge."""


@torch.no_grad()
def measure_sensitivity(
    model: Decoder, calibration: Calibration, matrices: Mapping[tuple[str, ...], Sequence[Coded]]
) -> dict[tuple[str, ...], list[float]]:
    """Kullback-Leibler divergence from the model's predictions to those with one matrix in codes, nats per token.

    Args:
        model: In floating point.
        calibration: What is predicted.
        matrices: By the names of the layers that share a matrix: forms that it might have.

    Returns:
        For each matrix the divergence of each form.
    """
    layers = {
        names: [
            [make_layer(model.get_submodule(name), coded, model.config.kernels) for name in names] for coded in forms
        ]
        for names, forms in matrices.items()
    }
    totals = {names: [0.0] * len(forms) for names, forms in layers.items()}
    tokens = 0
    for inputs_BL, targets_BL, documents_BL in calibration.batches(model.vocab_size, _device(model)):
        counted = (targets_BL != IGNORED).flatten()
        tokens += int(counted.sum())

        def predicted(inputs_BL: Tensor = inputs_BL, documents_BL: Tensor | None = documents_BL) -> Tensor:
            return log_softmax(model(inputs_BL, document_ids_BL=documents_BL).flatten(0, 1).float(), -1)

        whole = predicted()[counted]
        for names, forms in layers.items():
            for number, form in enumerate(forms):
                with _in_place(model, names, form):
                    found = predicted()[counted]
                totals[names][number] += float(kl_div(found, whole, reduction="none", log_target=True).double().sum())
    return {names: [max(0.0, total / tokens) for total in found] for names, found in totals.items()}


def _device(model: Decoder) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _in_place(model: nn.Module, names: Sequence[str], layers: Sequence[nn.Module]) -> Iterator[None]:
    """While this lasts, other layers stand in the place of those called `names`."""
    before = [model.get_submodule(name) for name in names]
    for name, layer in zip(names, layers, strict=True):
        replace_layer(model, name, layer)
    try:
        yield
    finally:
        for name, layer in zip(names, before, strict=True):
            replace_layer(model, name, layer)


def stored_bytes(coded: Coded) -> int:
    """Bytes of a matrix in a file, but for its header."""
    return sum(tensor.nbytes for tensor in stored_tensors(coded).values())


def choose_schemes(
    choices: Mapping[tuple[str, ...], Sequence[Choice]], config: QuantizeConfig, other_bytes: int
) -> dict[tuple[str, ...], Choice]:
    """Which form each matrix gets: from floating point on, one step after the other that costs least per byte saved.

    Divergences of single matrices are taken to add up, which holds while they are small.

    Args:
        choices: Forms of each matrix, floating point first.
        config: Its budget: bytes, which are met and no further, or divergence, which is kept.
        other_bytes: Of tensors that stay as they are.

    Raises:
        ConfigError: No choice meets `quantize.max_bytes_ratio`.
    """
    chosen = {names: forms[0] for names, forms in choices.items()}
    whole = other_bytes + sum(choice.bytes for choice in chosen.values())

    def taken() -> int:
        return other_bytes + sum(choice.bytes for choice in chosen.values())

    def within(names: tuple[str, ...], choice: Choice) -> bool:
        if config.max_kl is None:
            return True
        total = sum(other.kl for other in chosen.values())
        return total - chosen[names].kl + choice.kl <= config.max_kl

    limit = 0.0 if config.max_bytes_ratio is None else config.max_bytes_ratio * whole
    while taken() > limit:
        steps = [
            ((choice.kl - chosen[names].kl) / (chosen[names].bytes - choice.bytes), names, choice)
            for names, forms in choices.items()
            for choice in forms
            if choice.bytes < chosen[names].bytes and within(names, choice)
        ]
        if not steps:
            break
        _, names, choice = min(steps, key=lambda step: step[:2])
        chosen[names] = choice
    require(
        config.max_bytes_ratio is None or taken() <= limit,
        "quantize.max_bytes_ratio",
        config.max_bytes_ratio,
        f"cannot be met: the smallest form of every matrix leaves {taken() / whole:.3f} of {whole} bytes",
        f"Set quantize.max_bytes_ratio={taken() / whole + 0.0005:.3f}, or skip fewer modules.",
    )
    return _given_back(choices, chosen, limit - taken()) if config.max_bytes_ratio is not None else chosen


def _given_back(
    choices: Mapping[tuple[str, ...], Sequence[Choice]], chosen: dict[tuple[str, ...], Choice], spare: float
) -> dict[tuple[str, ...], Choice]:
    """The choice with better forms where the last step left bytes over, those first that gain most."""
    chosen = dict(chosen)
    while better := [
        (chosen[names].kl - choice.kl, names, choice)
        for names, forms in choices.items()
        for choice in forms
        if choice.kl < chosen[names].kl and choice.bytes - chosen[names].bytes <= spare
    ]:
        _, names, choice = max(better, key=lambda step: step[:2])
        spare -= choice.bytes - chosen[names].bytes
        chosen[names] = choice
    return chosen
