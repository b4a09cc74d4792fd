# mypy: disable-error-code="no-untyped-call, import-untyped"
"""One client for both transports of the inference server."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
import tritonclient.grpc  # has no types
import tritonclient.http
from numpy.typing import NDArray

TIMEOUT_S = 120.0
BROKEN = "StatusCode.UNAVAILABLE"
"""Status of an answer that broke off, over gRPC also before its first piece; refusals of the models have others."""
CUT = "StatusCode.CANCELLED"
"""Status that a proxy gives a gRPC stream which had begun when its server went away; who waits has not cancelled it."""
SHOWN_BYTES = 200
"""So much of an answer that is no JSON is told."""
TYPES = {
    "input_ids": np.int64,
    "max_tokens": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "repetition_penalty": np.float32,
    "seed": np.int64,
    "timeout_ms": np.int32,
    "stream": np.bool_,
    "log_probabilities": np.bool_,
    "top_log_probabilities": np.int32,
    "prompt_log_probabilities": np.bool_,
    "embedding": np.bool_,
}
"""Of the inputs of the text model that are no texts."""
COMPLETION = ("text_output", "finish_reason", "prompt_tokens", "completion_tokens")
"""Outputs of the text model, in the order of `Completion`."""


class Transport(StrEnum):
    """How requests travel."""

    http = "http"
    grpc = "grpc"
    shared_memory = "shared memory"
    """Of the machine that both are on; for scores only."""


TRANSPORTS = (Transport.http, Transport.grpc)
"""Those that reach a server anywhere, for scores and for texts."""


@dataclass(frozen=True)
class Completion:
    """What the text model answers, or a piece of it."""

    text: str
    finish_reason: str
    """`stop`: end of text or a stop string; `length`: as many tokens as asked for; empty: there is more to come."""
    prompt_tokens: int
    completion_tokens: int
    """So far."""
    version: str = ""
    """Of the model that answered."""


@dataclass(frozen=True)
class Reading:
    """What the text model says of a text as it is."""

    token_ids: list[int]
    places: list[int]
    """Where each token begins in the text, in characters."""
    log_probabilities: NDArray[np.float32]
    """Natural logarithms, of each token after the first."""
    log_probability: float
    """Their sum."""
    embedding: NDArray[np.float32]


class Client:
    """A connection; use it from one thread.

    Args:
        transport: HTTP or gRPC.
        address: `host:port` of that transport.
    """

    def __init__(self, transport: Transport, address: str) -> None:
        self.transport = transport
        self._address = address
        self._grpc = transport is Transport.grpc
        self._module = tritonclient.grpc if self._grpc else tritonclient.http
        timeouts = {} if self._grpc else {"connection_timeout": TIMEOUT_S, "network_timeout": TIMEOUT_S}
        self._client = self._module.InferenceServerClient(address, **timeouts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()

    def scores(
        self, model: str, ids_BL: NDArray[np.int64], mask_BL: NDArray[np.int64], version: str = ""
    ) -> NDArray[np.float32]:
        """Scores [B, V] of the token after each row's last real one.

        Args:
            model: Name of the scores model.
            ids_BL: Token ids.
            mask_BL: 1 for real tokens, 0 for padding on either side.
            version: Empty = the newest.

        Raises:
            tritonclient.utils.InferenceServerException: The server refuses the request.
        """
        result = self._infer(model, version, {"input_ids": ids_BL, "attention_mask": mask_BL})
        logits: NDArray[np.float32] = result.as_numpy("logits")
        return logits

    def answering_version(self, model: str, ids_BL: NDArray[np.int64], mask_BL: NDArray[np.int64]) -> str:
        """Which version of the scores model answers a request that names none; arguments as for `scores`."""
        response = self._infer(model, "", {"input_ids": ids_BL, "attention_mask": mask_BL}).get_response()
        return str(response.model_version if self._grpc else response["model_version"])

    def generate(
        self,
        model: str,
        text: str,
        *,
        version: str = "",
        stop: Sequence[str] = (),
        options: Mapping[str, float] | None = None,
    ) -> Completion:
        """The model's continuation of a text.

        Args:
            model: Name of the text model.
            text: Prompt.
            version: Empty = the newest.
            stop: The continuation ends before the first of these.
            options: Any of max_tokens, temperature, top_k, top_p, repetition_penalty, seed, timeout_ms.

        Raises:
            tritonclient.utils.InferenceServerException: The server refuses the request.
        """
        pieces = list(self.stream(model, text, version=version, stop=stop, options=options, stream=False))
        return pieces[-1]

    def stream(
        self,
        model: str,
        text: str,
        *,
        version: str = "",
        stop: Sequence[str] = (),
        options: Mapping[str, float] | None = None,
        stream: bool = True,
    ) -> Iterator[Completion]:
        """The model's continuation of a text, piece by piece as it grows; arguments as for `generate`.

        Whoever stops iterating closes the connection, which cancels the request.

        Raises:
            tritonclient.utils.InferenceServerException: The server refuses the request; or, with the status `BROKEN`,
                the answer broke off, however many pieces of it have come.
        """
        inputs: dict[str, Any] = {"text_input": text, "stream": stream, **(options or {})}
        if stop:
            inputs["stop"] = list(stop)
        with closing(self._ask_text(model, version, inputs)) as answers:
            for answer in answers:
                yield Completion(*(answer[name] for name in (*COMPLETION, "model_version")))

    def read(self, model: str, text: str | Sequence[int], *, version: str = "") -> Reading:
        """What the model says of a text: log-probabilities of its own tokens, and its embedding.

        Args:
            model: Name of the text model.
            text: The text, or its tokens.
            version: Empty = the newest.

        Raises:
            tritonclient.utils.InferenceServerException: The server refuses the request.
        """
        inputs = {**given_text(text), "prompt_log_probabilities": True, "embedding": True}
        (answer,) = self._ask_text(model, version, inputs)
        return Reading(
            token_ids=np.atleast_1d(answer["prompt_token_ids"]).astype(int).tolist(),
            places=np.atleast_1d(answer["prompt_places"]).astype(int).tolist(),
            log_probabilities=np.atleast_1d(np.asarray(answer["prompt_log_probabilities"], np.float32)),
            log_probability=float(answer["prompt_log_probability"]),
            embedding=np.atleast_1d(np.asarray(answer["embedding"], np.float32)),
        )

    def _ask_text(self, model: str, version: str, inputs: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """Responses of the text model, outputs by name and `model_version`."""
        return (self._ask_grpc if self._grpc else self._ask_http)(model, version, inputs)

    def _ask_http(self, model: str, version: str, inputs: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """Through the server's `generate` endpoints: models that answer when they like take no plain HTTP inference."""
        stream = "_stream" if inputs.get("stream") else ""
        path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/generate{stream}"
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        try:
            connection.request("POST", path, json.dumps(inputs), {"Content-Type": "application/json"})
            response = connection.getresponse()
            pieces, ended = 0, False
            for line in _lines(response):
                answer = _read_json(line, response)
                if "error" in answer:
                    raise tritonclient.utils.InferenceServerException(answer["error"], status=str(response.status))
                pieces, ended = pieces + 1, bool(answer["finish_reason"])
                yield answer
            if not ended:
                raise _broken_off(pieces, _status_of(response))
        finally:
            connection.close()

    def _ask_grpc(self, model: str, version: str, inputs: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()
        pieces, ended = 0, False
        self._client.start_stream(lambda result, error: answers.put((result, error)))
        try:
            self._client.async_stream_infer(model, self._tensors(as_arrays(inputs)), model_version=version)
            while not ended:
                result, error = answers.get(timeout=TIMEOUT_S)
                if error is not None:
                    ended = True
                    raise _named(error, pieces)
                answer = as_values(result)
                pieces, ended = pieces + 1, bool(answer["finish_reason"])
                yield answer
        finally:
            self._client.stop_stream(cancel_requests=not ended)

    def executed_batches(self, model: str) -> Counter[int]:
        """How many batches of each size the server has run so far."""
        as_json = {"as_json": True} if self._grpc else {}
        answer = self._client.get_inference_statistics(model, **as_json)
        batches: Counter[int] = Counter()
        for version in answer["model_stats"]:
            for entry in version.get("batch_stats", []):
                batches[int(entry["batch_size"])] += int(entry["compute_infer"]["count"])
        return batches

    def versions(self, model: str) -> list[int]:
        """Versions of a model that the server answers for.

        Raises:
            tritonclient.utils.InferenceServerException: It has no such model, or cannot be reached.
        """
        metadata = self._client.get_model_metadata(model)
        return [int(version) for version in (metadata.versions if self._grpc else metadata["versions"])]

    def is_ready(self, model: str, version: str) -> bool:
        """Whether the server answers for this version.

        Raises:
            tritonclient.utils.InferenceServerException: It cannot be reached.
        """
        return bool(self._client.is_model_ready(model, version))

    def server_version(self) -> str:
        """Version of the inference server."""
        metadata = self._client.get_server_metadata()
        return str(metadata.version if self._grpc else metadata["version"])

    def _infer(self, model: str, version: str, inputs: dict[str, NDArray[Any]]) -> Any:
        timeout = {"client_timeout": TIMEOUT_S} if self._grpc else {}
        return self._client.infer(model, self._tensors(inputs), model_version=version, **timeout)

    def _tensors(self, inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
        tensors = []
        for name, values in inputs.items():
            datatype = tritonclient.utils.np_to_triton_dtype(values.dtype)
            tensor = self._module.InferInput(name, list(values.shape), datatype)
            tensor.set_data_from_numpy(values)
            tensors.append(tensor)
        return tensors


def _broken_off(pieces: int, told: str) -> Exception:
    told = f"The answer broke off after {pieces} pieces ({told}). Ask again."
    error: Exception = tritonclient.utils.InferenceServerException(told, status=BROKEN)
    return error


def _named(error: Exception, pieces: int) -> Exception:
    """The error of a gRPC stream, or that the answer broke off, where its words do not say so."""
    if not isinstance(error, tritonclient.utils.InferenceServerException):
        return error
    refusal: Any = error  # the client library has no types
    is_cut = refusal.status() == CUT or (pieces > 0 and refusal.status() == BROKEN)
    return _broken_off(pieces, refusal.message()) if is_cut else error


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Lines with something in them; none more once the connection has broken."""
    with suppress(ConnectionError, http.client.HTTPException):
        yield from (line for line in response if line.strip())


def _read_json(line: bytes, response: http.client.HTTPResponse) -> dict[str, Any]:
    try:
        answer = json.loads(line.removeprefix(b"data: "))
        if isinstance(answer, dict):
            return answer
    except ValueError:
        pass
    told = f"{_status_of(response)}, with what is no JSON object: {line[:SHOWN_BYTES].decode(errors='replace')!r}"
    raise tritonclient.utils.InferenceServerException(told, status=str(response.status))


def _status_of(response: http.client.HTTPResponse) -> str:
    return f"HTTP {response.status} {response.reason}"


def given_text(text: str | Sequence[int]) -> dict[str, Any]:
    """The input of the text model that a text is, or its tokens."""
    return {"text_input": text} if isinstance(text, str) else {"input_ids": list(text)}


def as_arrays(inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Inputs of the text model as tensors; those that are empty lists are left out.

    Args:
        inputs: A number, a text or a list of them for each name.
    """
    arrays = {}
    for name, value in inputs.items():
        if name in TYPES:
            array = np.atleast_1d(np.array(value, dtype=TYPES[name]))
        else:
            texts = [value] if isinstance(value, str) else value
            array = np.array([text.encode() for text in texts], dtype=np.object_)
        if array.size:
            arrays[name] = array
    return arrays


def as_values(result: Any) -> dict[str, Any]:
    """A gRPC response of the text model: what is one text or number by its name, and `model_version`; else arrays."""
    response = result.get_response()
    values: dict[str, Any] = {"model_version": str(response.model_version)}
    for output in response.outputs:
        array = result.as_numpy(output.name)
        single = array.tolist()[0] if array.shape == (1,) else array
        values[output.name] = single.decode() if isinstance(single, bytes) else single
    return values
