# mypy: disable-error-code="import-not-found, import-untyped"
"""Text to text: tokenizes, asks the scores model of the same version for one token after the other, decodes.

Carries its own tokenizer library, because the server's Python has none, and so that the one that was verified serves.
"""

import importlib.machinery
import importlib.util
import json
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils  # provided by the server

from .digests import check_files
from .sampling import choose_token, cut_at_stop


class RefusedError(ValueError):
    """A request that cannot be answered; its neighbours in the batch can."""


@dataclass
class Row:
    """One text that is being continued."""

    ids: list[int]
    prompt_tokens: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stops: list[str]
    random: np.random.Generator
    text: str = ""
    finish_reason: str = ""
    new_ids: list[int] = field(default_factory=list)


class TritonPythonModel:
    """One instance of the text model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Checks the version's files and loads the tokenizer."""
        here = Path(__file__).parent
        check_files(here)
        settings = json.loads((here / "settings.json").read_text())
        self.sequence_length: int = settings["sequence_length"]
        self.max_new_tokens: int = settings["max_new_tokens"]
        self.default_max_tokens: int = settings["default_max_tokens"]
        self.scores_model = args["model_name"].removesuffix("_text")
        self.version = int(args["model_version"])
        self.tokenizer = load_library(here, settings["platform"]).Tokenizer.from_file(str(here / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # as in training: what a user types is text, never a control token
        self.end_of_text: int = self.tokenizer.token_to_id(settings["end_of_text"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers a batch of requests; their rows take every step together."""
        responses: dict[int, Any] = {}
        rows: dict[int, list[Row]] = {}
        for number, request in enumerate(requests):
            try:
                rows[number] = self.read(request)
            except RefusedError as error:
                responses[number] = pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                )
        try:
            self.generate([row for group in rows.values() for row in group])
        except pb_utils.TritonModelException as error:
            responses |= {number: pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for number in rows}
        else:
            responses |= {number: answer(group) for number, group in rows.items()}
        return [responses[number] for number in range(len(requests))]

    def generate(self, rows: list[Row]) -> None:
        """Continues every row until it has finished."""
        for row in rows:
            if row.max_tokens == 0:
                row.finish_reason = "length"
        while running := [row for row in rows if not row.finish_reason]:
            for row, logits_V in zip(running, self.scores([row.ids for row in running]), strict=True):
                token = choose_token(logits_V, row.temperature, row.top_k, row.top_p, row.random)
                self.append(row, token)

    def append(self, row: Row, token: int) -> None:
        """Adds a token to a row and sees whether the row has finished."""
        row.new_ids.append(token)
        if token == self.end_of_text:
            row.finish_reason = "stop"
            return
        row.ids.append(token)
        row.text = self.tokenizer.decode(row.new_ids, skip_special_tokens=False)
        before_stop = cut_at_stop(row.text, row.stops)
        if before_stop is not None:
            row.text, row.finish_reason = before_stop, "stop"
        elif len(row.new_ids) == row.max_tokens:
            row.finish_reason = "length"

    def scores(self, rows: list[list[int]]) -> npt.NDArray[Any]:
        """Scores [rows, vocabulary] of the token after each row, from the same version of the scores model."""
        windows = [row[-self.sequence_length :] for row in rows]
        longest = max(map(len, windows))
        ids_BL, mask_BL = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
        for number, window in enumerate(windows):
            ids_BL[number, : len(window)], mask_BL[number, : len(window)] = window, 1
        response = pb_utils.InferenceRequest(
            model_name=self.scores_model,
            model_version=self.version,
            requested_output_names=["logits"],
            inputs=[pb_utils.Tensor("input_ids", ids_BL), pb_utils.Tensor("attention_mask", mask_BL)],
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        logits: npt.NDArray[Any] = pb_utils.get_output_tensor_by_name(response, "logits").as_numpy()
        return logits

    def read(self, request: Any) -> list[Row]:
        """The rows of a request, or `RefusedError`."""
        texts = read_strings(request, "text_input")
        if not texts:  # the server counts inputs before it calls, and does not look at their names
            raise RefusedError("text_input is missing")
        fields: dict[str, list[Any]] = {
            "max_tokens": read_numbers(request, "max_tokens", len(texts), self.default_max_tokens),
            "temperature": read_numbers(request, "temperature", len(texts), 0.0),
            "top_k": read_numbers(request, "top_k", len(texts), 0),
            "top_p": read_numbers(request, "top_p", len(texts), 1.0),
            "seed": read_numbers(request, "seed", len(texts), None),
        }
        stops = read_strings(request, "stop") or [[]] * len(texts)
        settings = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
        return [self.row(text[0], stop, **one) for text, stop, one in zip(texts, stops, settings, strict=True)]

    def row(
        self,
        text: str,
        stops: list[str],
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None,
    ) -> Row:
        """A text to continue, its settings checked."""
        if not 0 <= max_tokens <= self.max_new_tokens:
            raise RefusedError(f"max_tokens is {max_tokens}: it must lie between 0 and {self.max_new_tokens}")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise RefusedError(f"temperature is {temperature}: it must be 0 (the likeliest token) or more")
        if top_k < 0:
            raise RefusedError(f"top_k is {top_k}: it must be 0 (all tokens) or more")
        if not 0 < top_p <= 1:
            raise RefusedError(f"top_p is {top_p}: it must be above 0 and at most 1")
        if seed is not None and seed < 0:
            raise RefusedError(f"seed is {seed}: it must be 0 or more")
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        room = max(1, self.sequence_length + 1 - max_tokens)  # the last new token is not read again
        kept = ids[-room:] or [self.end_of_text]
        random = np.random.default_rng(seed)
        return Row(kept, len(ids), max_tokens, temperature, top_k, top_p, [stop for stop in stops if stop], random)


def load_library(version_dir: Path, built_for: str) -> Any:
    """The tokenizer library that the version carries."""
    if platform.machine() != built_for:
        raise RuntimeError(
            f"this version carries a tokenizer library for {built_for} and cannot serve on {platform.machine()}. "
            "Publish it from a machine of that kind."
        )
    loader = importlib.machinery.ExtensionFileLoader("tokenizers", str(version_dir / "tokenizers.abi3.so"))
    spec = importlib.util.spec_from_loader("tokenizers", loader)
    assert spec is not None
    library = importlib.util.module_from_spec(spec)
    loader.exec_module(library)
    return library


def read_strings(request: Any, name: str) -> list[list[str]]:
    """Rows of a string input; no rows if the request has no such input."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return []
    try:
        return [[value.decode() for value in row] for row in tensor.as_numpy()]
    except UnicodeDecodeError as error:
        raise RefusedError(f"{name} is not UTF-8: {error}") from error


def read_numbers(request: Any, name: str, rows: int, default: Any) -> list[Any]:
    """One number per row; the default if the request has no such input."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [default] * rows if tensor is None else [row[0].item() for row in tensor.as_numpy()]


def answer(rows: list[Row]) -> Any:
    """The response to a request of these rows."""
    columns = {
        "text_output": np.array([[row.text.encode()] for row in rows], dtype=np.object_),
        "finish_reason": np.array([[row.finish_reason.encode()] for row in rows], dtype=np.object_),
        "prompt_tokens": np.array([[row.prompt_tokens] for row in rows], dtype=np.int32),
        "completion_tokens": np.array([[len(row.new_ids)] for row in rows], dtype=np.int32),
    }
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in columns.items()])
