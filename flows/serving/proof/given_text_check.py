"""Compares what is served about texts as they are with the checkpoint: log-probabilities of their tokens, embeddings.

Shape letters: L length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax, normalize
from tritonclient.utils import InferenceServerException

from flows.config.serving import Pooling
from flows.model.decoder import Decoder
from flows.serving.client import TRANSPORTS, Reading, Transport
from flows.serving.proof.scores_check import FLOOR_ULPS, Check, Ids
from flows.serving.proof.text_check import Served


@dataclass(frozen=True)
class GivenText:
    """A text, and what the checkpoint says of it."""

    ids: list[int]
    log_probabilities: NDArray[np.float32]
    """Of its tokens after the first [L - 1]."""
    embedding: NDArray[np.float32]
    """[D], of length 1."""


@dataclass(frozen=True)
class GivenTexts:
    """Texts of every length, and how exact the checkpoint is about them."""

    texts: Sequence[GivenText]
    log_probability_tolerance: float
    embedding_tolerance: float
    longest: int
    """Tokens of a text at most."""
    pooling: Pooling


@torch.no_grad()
def make_given_texts(
    model: Decoder, ids_NL: Ids, lengths: Sequence[int], pooling: Pooling, tolerance: float, noise_factor: float
) -> GivenTexts:
    """What the checkpoint says of texts in plain torch, one at a time, without padding.

    Args:
        model: The checkpoint.
        ids_NL: Inputs to cut texts from, as they come; at most one for each length is read.
        lengths: Of the texts.
        pooling: How hidden states become an embedding.
        tolerance: Of scores. Log-probabilities differ by at most twice as much as scores: log softmax subtracts from
            each score a mean of all.
        noise_factor: Tolerance of embeddings as a multiple of the largest difference between those in float32 and in
            float64, of every beginning of every text and of every token alone: where activations are rounded to 8 bits,
            a code that goes the other way shows most in the shortest texts, of which there are few.
    """
    double = copy.deepcopy(model).double()
    texts, noise = [], 0.0
    for number, length in enumerate(lengths):
        ids_L = torch.from_numpy(ids_NL[number % len(ids_NL), :length])
        hidden_LD = model.forward_hidden(ids_L[None])[0]
        exact_LD = double.forward_hidden(ids_L[None])[0]
        for one in (pooling, Pooling.last):
            noise = max(noise, float((_embeddings(hidden_LD, one) - _embeddings(exact_LD, one)).abs().max()))
        scores_LV = log_softmax(model.lm_head(hidden_LD[:-1]).double(), -1)
        values_L = scores_LV.gather(-1, ids_L[1:, None])[:, 0].float()
        texts.append(GivenText(ids_L.tolist(), values_L.numpy(), _embeddings(hidden_LD, pooling)[-1].float().numpy()))
    floor = FLOOR_ULPS * float(np.finfo(np.float32).eps)  # no number in a vector of length 1 is larger than 1
    return GivenTexts(texts, 2 * tolerance, noise_factor * noise + floor, max(lengths), pooling)


def _embeddings(hidden_LD: Tensor, pooling: Pooling) -> Tensor:
    """The embedding of each beginning of a text [L, D]."""
    hidden_LD = hidden_LD.double()
    return normalize(hidden_LD.cumsum(0) if pooling == Pooling.mean else hidden_LD, dim=-1)


def check_given_texts(served: Served, given: GivenTexts) -> list[Check]:
    """Three rows per transport: log-probabilities and embeddings, texts alone and all at once; a text that is too long.

    Args:
        served: The text model.
        given: Texts, and what to expect.
    """
    checks = []
    twice = [*given.texts, *given.texts]  # so that texts of different lengths surely meet
    with ThreadPoolExecutor(len(twice)) as pool:
        for transport in TRANSPORTS:
            alone = [_read(served, transport, text.ids) for text in given.texts]
            together = pool.map(lambda text: _read(served, transport, text.ids), twice)  # noqa: B023
            answers = [*zip(given.texts, alone, strict=True), *zip(twice, together, strict=True)]
            checks.append(_check_log_probabilities(transport, answers, given))
            checks.append(_check_embeddings(transport, answers, given))
            checks.append(_check_too_long(served, transport, given))
    return checks


def _read(served: Served, transport: Transport, ids: Sequence[int]) -> Reading:
    with served.endpoint.connect(transport) as client:
        return client.read(served.model, ids, version=served.version)


def _check_log_probabilities(
    transport: Transport, answers: Sequence[tuple[GivenText, Reading]], given: GivenTexts
) -> Check:
    worst, failure = 0.0, None
    for text, reading in answers:
        worst = max(worst, _largest(reading.log_probabilities, text.log_probabilities))
        sum_ulp = float(np.spacing(np.float32(abs(reading.log_probability))))
        if reading.token_ids != text.ids or len(reading.places) != len(text.ids):
            failure = f"it speaks of other tokens than the {len(text.ids)} that were given"
        elif abs(reading.log_probabilities.sum(dtype=np.float64) - reading.log_probability) > len(text.ids) * sum_ulp:
            failure = f"the sum is {reading.log_probability}, not that of the tokens"
    tolerance, details = given.log_probability_tolerance, {"transport": transport.value, "texts": len(given.texts)}
    passed = failure is None and worst <= tolerance
    return Check("given text", passed, worst, tolerance, details | ({"failure": failure} if failure else {}))


def _check_embeddings(transport: Transport, answers: Sequence[tuple[GivenText, Reading]], given: GivenTexts) -> Check:
    worst = max(_largest(reading.embedding, text.embedding) for text, reading in answers)
    details = {"transport": transport.value, "texts": len(given.texts), "pooling": given.pooling.value}
    return Check("embeddings", worst <= given.embedding_tolerance, worst, given.embedding_tolerance, details)


def _check_too_long(served: Served, transport: Transport, given: GivenTexts) -> Check:
    """Nothing is left out of a text without a word."""
    details = {"transport": transport.value, "request": "a given text that is too long"}
    try:
        _read(served, transport, [0] * (given.longest + 1))
        details["failure"] = "it was answered"
    except InferenceServerException as error:
        if str(given.longest) not in str(error.message()):
            details["failure"] = f"it was refused without the limit: {error.message()}"
    return Check("refusals", "failure" not in details, details=details)


def _largest(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference; infinite where the shape is wrong or a value is not a number."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max(initial=0.0))
