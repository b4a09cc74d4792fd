"""Compares served scores with the checkpoint's: every batch size, length and padding, every transport, real batches.

Shape letters: N inputs, L length, B batch size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from flows.serving.client import Transport
from flows.serving.endpoint import Endpoint

Ids = NDArray[np.int64]
FLOOR_ULPS = 4
"""Tolerance is at least this many units in the last place of the largest score, in float32."""
CONCURRENT_ROUNDS = 5
"""Rounds of concurrent requests in which the server has to have formed a batch at least once."""


@dataclass(frozen=True)
class Check:
    """One row of the passport."""

    name: str
    passed: bool
    worst_difference: float | None = None
    tolerance: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """Inputs, the checkpoint's scores for several lengths of each, and how exact these are."""

    ids_NL: Ids
    logits_NV: dict[int, NDArray[np.float32]]
    """By length: scores after the first so many tokens of each input."""
    noise: float
    """Largest difference between the checkpoint in float32 and in float64."""
    tolerance: float


def make_reference(model: nn.Module, ids_NL: Ids, lengths: Sequence[int], noise_factor: float) -> Reference:
    """What the checkpoint says about every input in plain torch, one at a time, without padding.

    A causal model's scores at position l are those of the first l tokens, so that one pass gives all lengths.
    """
    double = copy.deepcopy(model).double()
    places = torch.tensor(lengths) - 1
    single_NLV, noise, largest = [], 0.0, 0.0
    with torch.no_grad():
        for ids_L in tqdm(torch.from_numpy(ids_NL), desc="reference", disable=None):
            logits_LV = model(ids_L[None])[0].float()
            exact_LV = double(ids_L[None])[0]
            # over all positions: in an INT8 model few of them show what a code that goes the other way does
            noise = max(noise, float((logits_LV - exact_LV).abs().max()))
            largest = max(largest, float(exact_LV.abs().max()))
            single_NLV.append(logits_LV[places].numpy())
    floor = FLOOR_ULPS * float(np.finfo(np.float32).eps) * largest
    by_length = {length: np.stack([one[place] for one in single_NLV]) for place, length in enumerate(lengths)}
    return Reference(ids_NL, by_length, noise, noise_factor * noise + floor)


@dataclass(frozen=True)
class Batch:
    """One request: rows of the reference's inputs, cut to lengths, padded to a rectangle."""

    rows: Sequence[int]
    lengths: Sequence[int]
    ids_BL: Ids
    mask_BL: Ids

    def worst_difference(self, logits_BV: NDArray[np.float32], reference: Reference) -> float:
        """Largest difference from the checkpoint; infinite where the shape is wrong or a score is not a number."""
        pairs = zip(self.rows, self.lengths, strict=True)
        expected_BV = np.stack([reference.logits_NV[length][row] for row, length in pairs])
        if logits_BV.shape != expected_BV.shape or not np.isfinite(logits_BV).all():
            return float("inf")
        return float(np.abs(logits_BV - expected_BV).max())


def make_batch(
    reference: Reference,
    rows: Sequence[int],
    lengths: Sequence[int],
    width: int,
    side: str,
    random: np.random.Generator,
) -> Batch:
    """Inputs padded to `width` on the `left` or `right`; what stands in the padding is random and must not matter."""
    ids_BL = random.integers(0, reference.ids_NL.max() + 1, (len(rows), width))
    mask_BL = np.zeros((len(rows), width), np.int64)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids_BL[number, place] = reference.ids_NL[row, :length]
        mask_BL[number, place] = 1
    return Batch(rows, lengths, ids_BL, mask_BL)


def check_scores(
    endpoint: Endpoint,
    transports: Sequence[Transport],
    model: str,
    version: str,
    reference: Reference,
    max_batch_size: int,
    random: np.random.Generator,
) -> list[Check]:
    """One row per transport, batch size, length and padding, then one per transport for concurrent requests.

    Args:
        endpoint: The server.
        transports: How to ask.
        model: Name of the scores model.
        version: The version to ask.
        reference: What to expect.
        max_batch_size: Largest batch of the model.
        random: Chooses rows and padding.
    """
    checks = []
    for transport in transports:
        with endpoint.connect(transport) as client:
            cases = list(_cases(reference, max_batch_size, random))
            for details, batch in tqdm(cases, desc=f"scores over {transport}", disable=None):
                logits_BV = client.scores(model, batch.ids_BL, batch.mask_BL, version)
                worst = batch.worst_difference(logits_BV, reference)
                details = {"transport": transport.value, **details}
                checks.append(Check("scores", worst <= reference.tolerance, worst, reference.tolerance, details))
        checks.append(_check_concurrent(endpoint, transport, model, version, reference, max_batch_size, random))
    return checks


def _cases(
    reference: Reference, max_batch_size: int, random: np.random.Generator
) -> Iterator[tuple[dict[str, Any], Batch]]:
    longest, inputs = reference.ids_NL.shape[1], len(reference.ids_NL)
    lengths = sorted(reference.logits_NV)
    for size in range(1, max_batch_size + 1):
        for length in lengths:
            for padding in ("none", "left", "right") if length < longest else ("none",):
                width = length if padding == "none" else int(random.integers(length + 1, longest + 1))
                rows = random.integers(0, inputs, size).tolist()
                details = {"batch_size": size, "length": length, "padding": padding}
                yield details, make_batch(reference, rows, [length] * size, width, padding, random)
        for padding in ("left", "right"):
            mixed = random.choice(lengths, size).tolist()
            rows = random.integers(0, inputs, size).tolist()
            details = {"batch_size": size, "length": "mixed", "padding": padding}
            yield details, make_batch(reference, rows, mixed, max(mixed), padding, random)


def _check_concurrent(
    endpoint: Endpoint,
    transport: Transport,
    model: str,
    version: str,
    reference: Reference,
    max_batch_size: int,
    random: np.random.Generator,
) -> Check:
    """Single requests of mixed lengths, many at once, so that the server itself forms the batches."""
    lengths, longest = sorted(reference.logits_NV), reference.ids_NL.shape[1]
    threads, worst = 2 * max_batch_size, 0.0

    def ask(batches: list[Batch]) -> float:
        with endpoint.connect(transport) as client:
            return max(
                batch.worst_difference(client.scores(model, batch.ids_BL, batch.mask_BL, version), reference)
                for batch in batches
            )

    with endpoint.connect(transport) as observer, ThreadPoolExecutor(threads) as pool:
        before = observer.executed_batches(model)
        for _ in range(CONCURRENT_ROUNDS):
            work: list[list[Batch]] = [[] for _ in range(threads)]
            for batches in work * 4:
                length = int(random.choice(lengths))
                width, side = int(random.integers(length, longest + 1)), str(random.choice(["left", "right"]))
                row = int(random.integers(0, len(reference.ids_NL)))
                batches.append(make_batch(reference, [row], [length], width, side, random))
            worst = max(worst, *pool.map(ask, work))
            formed = observer.executed_batches(model) - before
            if max(formed) > 1:
                break
    details = {"transport": transport.value, "batches_by_size": {str(size): formed[size] for size in sorted(formed)}}
    batched = max_batch_size == 1 or max(formed) > 1
    if not batched:
        details["failure"] = f"no batch was formed from {threads} concurrent clients in {CONCURRENT_ROUNDS} rounds"
    return Check("concurrent", batched and worst <= reference.tolerance, worst, reference.tolerance, details)
