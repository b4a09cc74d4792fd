# mypy: disable-error-code="import-not-found, import-untyped"
"""What leaves the text model: responses, what they say of tokens, and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # provided by the server

from .continuous_batching import Text
from .given_text import Likelihoods


def deliver(sender: Any, outputs: dict[str, Any], is_last: bool) -> None:
    """Sends a response."""
    try:
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in outputs.items()])
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)
    except Exception as error:  # whatever it is, nobody may wait for an answer for ever
        pb_utils.Logger.log_error(f"text response: {error!r}")
        fail(sender, f"the response cannot be sent: {error}.", pb_utils.TritonError.INTERNAL)


def describe(likelihoods: Likelihoods, first: int, kind: str) -> dict[str, Any]:
    """Outputs for the tokens from number `first` on; `kind` goes before their names."""
    outputs: dict[str, Any] = {
        f"{kind}log_probabilities": np.array(likelihoods.log_probabilities[first:], dtype=np.float32)
    }
    if likelihoods.alternatives:
        shape = (-1, likelihoods.alternatives)
        ids = np.array(likelihoods.top_ids[first:], dtype=np.int64)
        values = np.array(likelihoods.top_log_probabilities[first:], dtype=np.float32)
        outputs[f"{kind}top_token_ids"] = ids.reshape(shape)
        outputs[f"{kind}top_log_probabilities"] = values.reshape(shape)
    return outputs


def describe_prompt(text: Text, places: list[int]) -> dict[str, Any]:
    """Outputs that tell of the prompt; log-probabilities are those of its tokens after the first."""
    outputs: dict[str, Any] = {}
    if text.prompt_likelihoods is not None:
        given = text.asked_prompt_tokens  # of an empty text none, though the model reads an end of text
        outputs["prompt_token_ids"] = np.array(text.ids[:given], dtype=np.int64)
        outputs["prompt_places"] = np.array(places[:given], dtype=np.int32)
        outputs |= describe(text.prompt_likelihoods, 0, "prompt_")
        total = sum(text.prompt_likelihoods.log_probabilities)
        outputs["prompt_log_probability"] = np.array([total], dtype=np.float32)
    if text.pool is not None:
        outputs["embedding"] = text.pool.embedding()
    return outputs


def fail(sender: Any, message: str, code: Any) -> None:
    """Ends a request with an error."""
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
