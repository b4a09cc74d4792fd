"""Inputs of made-up tokens with the checkpoint's answers, recorded in a passport, and how far a server is from them."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.serving.client import Client, Transport

if TYPE_CHECKING:  # these import torch, which a server does not need
    from flows.serving.proof.scores_check import Reference
    from flows.serving.proof.text_check import Checkpoint

RECORDED = "recorded"
"""Part of the passport with the samples."""
LONGEST_SAMPLE_TOKENS = 64
KEPT_SCORES = 64
"""So many of the largest scores of each sample are recorded, and as many spread over the vocabulary."""
TIMEOUT_S = 60.0


def record_samples(
    reference: Reference, checkpoint: Checkpoint, first_row: int, text_tolerance: float
) -> dict[str, Any]:
    """What can be asked of a server later, with the checkpoint's answers: one sample for each of the shorter lengths.

    Args:
        reference: Inputs and the checkpoint's scores.
        checkpoint: The model behind the texts.
        first_row: The first input of the reference that is made up; those before it hold somebody's text.
        text_tolerance: Of the scores behind the texts.
    """
    samples: list[dict[str, Any]] = []
    shortest = min(reference.logits_NV)
    for length in (one for one in sorted(reference.logits_NV) if one <= max(shortest, LONGEST_SAMPLE_TOKENS)):
        row = first_row + len(samples) % (len(reference.ids_NL) - first_row)
        scores_V = reference.logits_NV[length][row]
        spread = np.linspace(0, len(scores_V) - 1, KEPT_SCORES).astype(int)
        token_ids = sorted({*spread.tolist(), *np.argsort(scores_V)[-KEPT_SCORES:].tolist()})
        ids = reference.ids_NL[row, :length].tolist()
        samples.append(
            {
                "input_ids": ids,
                "token_ids": token_ids,
                "scores": scores_V[token_ids].tolist(),
                "log_probability": checkpoint.best_log_probability(ids),
            }
        )
    return {"tolerance": reference.tolerance, "text_tolerance": text_tolerance, "samples": samples}


def scores_drift(address: str, model: str, recorded: Mapping[str, Any], version: str = "") -> float:
    """Largest difference of the scores that a server gives, over the passport's tolerance.

    Args:
        address: `host:port` of the server's HTTP endpoint.
        model: Name of the scores model.
        recorded: What `record_samples` returned.
        version: Empty = what is answered to who names none.

    Raises:
        InferenceServerException: It refuses a sample.
        OSError: It does not answer.
    """
    worst = 0.0
    with Client(Transport.http, address) as client:
        for sample in recorded["samples"]:
            ids_BL = np.array([sample["input_ids"]], np.int64)
            scores_V = client.scores(model, ids_BL, np.ones_like(ids_BL), version)[0]
            if len(scores_V) <= max(sample["token_ids"]):
                return math.inf
            worst = _worse(worst, np.abs(scores_V[sample["token_ids"]] - np.array(sample["scores"])).max())
    return worst / float(recorded["tolerance"])


def text_drift(address: str, model: str, recorded: Mapping[str, Any]) -> float:
    """Largest difference of the likeliest next token's log-probability, over what the passport allows.

    Scores that are each off by a tolerance at most move their largest by as much, and the logarithm of the sum, too;
    hence twice the tolerance. Arguments as for `scores_drift`.

    Raises:
        OSError: It does not answer, or refuses a sample.
    """
    worst = 0.0
    for sample in recorded["samples"]:
        body = {"input_ids": sample["input_ids"], "max_tokens": 1, "log_probabilities": True}
        url = f"http://{address}/v2/models/{model}/generate"
        request = urllib.request.Request(url, json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answer = json.loads(response.read())
        worst = _worse(worst, np.max(np.abs(answer["log_probabilities"] - np.float64(sample["log_probability"]))))
    return worst / (2 * float(recorded["text_tolerance"]))


def _worse(worst: float, difference: float) -> float:
    return max(worst, float(difference)) if np.isfinite(difference) else math.inf
