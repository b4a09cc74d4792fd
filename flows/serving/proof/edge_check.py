"""Compares served scores with the checkpoint's on special tokens, and sees that what cannot be answered is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from flows.serving.client import Transport
from flows.serving.endpoint import Endpoint
from flows.serving.proof.scores_check import Check, Ids, Reference, make_batch


def special_inputs(tokenizer: Tokenizer, eos_token_id: int, vocab_size: int, length: int, random: Ids) -> Ids:
    """Two inputs [2, L]: special tokens alone, and special tokens among others, first and last.

    Args:
        tokenizer: Knows which tokens are special.
        eos_token_id: Special in any case.
        vocab_size: Tokens beyond are not the model's.
        length: L.
        random: Other tokens [L].
    """
    added = tokenizer.get_added_tokens_decoder()
    special = sorted({eos_token_id, *(token for token, one in added.items() if one.special and token < vocab_size)})
    alone = np.resize(np.array(special, np.int64), length)
    among = random.copy()
    among[::3] = alone[::3]
    among[-1] = eos_token_id
    return np.stack([alone, among])


def check_special_tokens(
    endpoint: Endpoint,
    transports: Sequence[Transport],
    model: str,
    version: str,
    reference: Reference,
    rows: Sequence[int],
    random: np.random.Generator,
) -> list[Check]:
    """One row per transport: inputs with special tokens at every length, padded on no side, left and right.

    Args:
        endpoint: The server.
        transports: How to ask.
        model: Name of the scores model.
        version: The version to ask.
        reference: What to expect.
        rows: Inputs of the reference that hold special tokens.
        random: Chooses the padding.
    """
    checks, longest = [], reference.ids_NL.shape[1]
    for transport in transports:
        worst = 0.0
        with endpoint.connect(transport) as client:
            for length in reference.logits_NV:
                for side in ("left", "right"):
                    for row in rows:
                        width = int(random.integers(length, longest + 1))
                        batch = make_batch(reference, [row], [length], width, side, random)
                        logits_BV = client.scores(model, batch.ids_BL, batch.mask_BL, version)
                        worst = max(worst, batch.worst_difference(logits_BV, reference))
        details = {"transport": transport.value, "inputs": len(rows), "lengths": sorted(reference.logits_NV)}
        checks.append(Check("special tokens", worst <= reference.tolerance, worst, reference.tolerance, details))
    return checks


def check_refusals(
    endpoint: Endpoint,
    transports: Sequence[Transport],
    model: str,
    version: str,
    vocab_size: int,
    sequence_length: int,
    max_batch_size: int,
) -> list[Check]:
    """One row per transport and request that has no answer: it is refused, with a reason.

    Args:
        endpoint: The server.
        transports: How to ask.
        model: Name of the scores model.
        version: The version to ask.
        vocab_size: Number of tokens.
        sequence_length: Longest input.
        max_batch_size: Largest batch.
    """
    one = np.ones((1, 1), np.int64)
    requests = {
        "no token": (np.zeros((1, 0), np.int64), np.zeros((1, 0), np.int64)),
        "one token too many": (np.ones((1, sequence_length + 1), np.int64),) * 2,
        "an id beyond the vocabulary": (vocab_size * one, one),
        "an id below 0": (-one, one),
        "a mask of zeros": (one, 0 * one),
        "one row too many": (np.ones((max_batch_size + 1, 1), np.int64),) * 2,
    }
    checks = []
    for transport in transports:
        with endpoint.connect(transport) as client:
            for name, (ids_BL, mask_BL) in requests.items():
                try:
                    client.scores(model, ids_BL, mask_BL, version)
                    failure = {"failure": "it was answered"}
                except InferenceServerException as error:
                    failure = {} if error.message() else {"failure": "it was refused without a reason"}
                details = {"transport": transport.value, "request": name, **failure}
                checks.append(Check("refusals", not failure, details=details))
    return checks
