"""Requests that a public endpoint meets sooner or later: malformed, oversized, cut off, or sent by mistake."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flows.serving.repository import model_names

JSON = {"Content-Type": "application/json"}
NUMBERS = (0, 1, -1, 2**31, 2**32 + 1, 2**63 - 1, -(2**63), 2**64, 1e308, -0.0, 10**40)
VALUES: tuple[Any, ...] = (None, True, "", "x" * 3000, [], {}, [[[]]], {"a": {"b": []}}, "\u0000", *NUMBERS)
TYPES = ("INT64", "INT32", "FP32", "BYTES", "BOOL", "FP64", "UINT8", "BF16", "int64", "", "X" * 500)
TEXTS = (
    "\ud7ff\ue000",
    "e\u0301" * 50,
    "\U0001f469\u200d\U0001f680" * 9,
    "\x00\x01\x1b",
    "\u202e\u2066abc\u2069",
    "\ufeff",
)


@dataclass(frozen=True)
class FuzzRequest:
    """One request, or what looks like one."""

    kind: str
    raw: bytes
    """What is written to the connection."""
    hangs_up: bool = False
    """Whether the connection is closed without waiting for an answer."""
    is_http: bool = field(default=True)
    """Whether an answer is due."""


def make_request(number: int, model: str, key: str, seed: int) -> FuzzRequest:
    """Request of that number; the same seed gives the same requests.

    Args:
        number: Which.
        model: Name of a scores model that is there, with its text model.
        key: That the endpoint asks for; some requests carry another.
        seed: Of all of them.
    """
    random = np.random.default_rng([seed, number])
    kinds: Mapping[str, Callable[[np.random.Generator, str, str], FuzzRequest]] = {
        "shape": _shape,
        "data type": _data_type,
        "bytes": _bytes,
        "lengths": _lengths,
        "unicode": _unicode,
        "values": _values,
        "dropped": _dropped,
        "paths": _paths,
        "large": _large,
        "good": _good,
    }
    name = list(kinds)[number % len(kinds)]
    return kinds[name](random, model, key if random.random() > 0.02 else "wrong")


def http(
    kind: str,
    path: str,
    body: bytes,
    key: str,
    headers: Mapping[str, str] | None = None,
    method: str = "POST",
    **more: bool,
) -> FuzzRequest:
    """A request as bytes, with `Content-Length` unless it is given."""
    all_headers = {"Host": "x", "Authorization": f"Bearer {key}", "Connection": "close", **JSON}
    all_headers |= {"Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
    return FuzzRequest(kind, f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body, **more)


def infer_body(ids: Any, mask: Any, shape: Any, datatype: Any = "INT64") -> dict[str, Any]:
    """JSON of a request to the scores model."""
    return {
        "inputs": [
            {"name": name, "shape": shape, "datatype": datatype, "data": data}
            for name, data in (("input_ids", ids), ("attention_mask", mask))
        ]
    }


def _pick(random: np.random.Generator, choices: Any) -> Any:
    return choices[int(random.integers(len(choices)))]


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def _text_path(model: str) -> str:
    return f"/v2/models/{model_names(model)[1]}/generate"


def _good(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    if random.random() < 0.5:
        return http("good", f"/v2/models/{model}/infer", _encoded(infer_body([1, 2], [1, 1], [1, 2])), key)
    kind = int(random.integers(0, 3))
    if kind == 0:
        return http("good", "/v1/embeddings", _encoded({"model": model, "input": ["def", "class"]}), key)
    body = {"model": model, "prompt": "def", "max_tokens": 2, "stream": bool(random.random() < 0.5)}
    if kind == 1:
        body |= {"max_tokens": 0, "stream": False, "echo": True, "logprobs": 2}
    return http("good", "/v1/completions", _encoded(body), key)


def _shape(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    sizes = [0, 1, 2, 3, 7, 1000, -1, 2**31, 2**62, 2**63, 10**30, 1.5, "2", None]
    shape = [_pick(random, sizes) for _ in range(int(random.integers(0, 12)))]
    count = int(random.integers(0, 40))
    return http("shape", f"/v2/models/{model}/infer", _encoded(infer_body([1] * count, [1] * count, shape)), key)


def _data_type(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    data = [_pick(random, VALUES) for _ in range(3)]
    body = infer_body(data, data, [1, 3], _pick(random, TYPES))
    if random.random() < 0.3:
        body["inputs"][0]["parameters"] = {"shared_memory_region": "x", "shared_memory_byte_size": 24}
    return http("data type", f"/v2/models/{model}/infer", _encoded(body), key)


def _bytes(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    noise = random.bytes(int(random.integers(1, 400)))
    if random.random() < 0.3:
        return FuzzRequest("bytes", noise, is_http=False)
    path = _pick(random, [f"/v2/models/{model}/infer", _text_path(model), "/v1/chat/completions"])
    whole = _encoded(infer_body([1, 2], [1, 1], [1, 2]))
    cut = int(random.integers(0, len(whole)))
    return http("bytes", path, _pick(random, [noise, whole[:cut], whole[:cut] + noise + whole[cut:]]), key)


def _lengths(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    """Raw tensors behind JSON that lies about their size."""
    raw = struct.pack("<2q", 1, 2) + struct.pack("<2q", 1, 1)
    sizes = [0, 8, 15, 16, 17, -16, 2**31, 2**63]
    body = infer_body(0, 0, [1, 2])
    for tensor in body["inputs"]:
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": 16 if random.random() < 0.6 else _pick(random, sizes)}
    header = _encoded(body)
    stated = _pick(random, [len(header), len(header) - 1, len(header) + 1, 0, -5, 2**40, "x"])
    headers = {"Inference-Header-Content-Length": str(stated)}
    if random.random() < 0.1:
        headers["Content-Length"] = _pick(random, ["-1", "x", "99999999999999999999"])
    cut = len(raw) if random.random() < 0.7 else int(random.integers(0, len(raw)))
    return http("lengths", f"/v2/models/{model}/infer", header + raw[:cut], key, headers)


def _unicode(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    points = random.integers(0, 0x110000, int(random.integers(1, 60)))
    text = _pick(random, [*TEXTS, "".join(map(chr, points))])  # lone surrogates among them
    if random.random() < 0.5:
        body: dict[str, Any] = {"text_input": text, "max_tokens": 1}
        return http("unicode", _text_path(model), _encoded(body), key)
    body = {"model": _pick(random, [model, text]), "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    return http("unicode", "/v1/chat/completions", _encoded(body), key)


def _values(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    names = ["prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream", "echo", "logprobs"]
    body: dict[str, Any] = {"model": model, "prompt": "def", "max_tokens": 2}
    for _ in range(int(random.integers(1, 4))):
        body[_pick(random, names)] = _pick(random, VALUES)
    if random.random() < 0.2:
        body = {"model": model, "input": "def"}
        body[_pick(random, ["input", "encoding_format", "dimensions"])] = _pick(random, VALUES)
        return http("values", "/v1/embeddings", _encoded(body), key)
    if random.random() < 0.2:
        given = ["input_ids", "prompt_log_probabilities", "embedding", "top_log_probabilities", "max_tokens"]
        body = {"text_input": "def", "embedding": True, _pick(random, given): _pick(random, VALUES)}
        return http("values", _text_path(model), _encoded(body), key)
    return http("values", "/v1/completions", _encoded(body), key)


def _dropped(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    """A client that leaves: in the middle of its request, or of a stream."""
    body = {"text_input": "def", "max_tokens": 30, "stream": True}
    whole = http("dropped", f"{_text_path(model)}_stream", _encoded(body), key)
    cut = len(whole.raw) if random.random() < 0.6 else int(random.integers(1, len(whole.raw)))
    return FuzzRequest("dropped", whole.raw[:cut], hangs_up=True)


def _paths(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    paths = [
        "/v2/repository/index",
        f"/v2/repository/models/{model}/unload",
        "/v2/repository/models/x/load",
        "/v2/systemsharedmemory/region/x/register",
        "/v2/cudasharedmemory/status",
        "/v2/trace/setting",
        "/v2/logging",
        f"/v2/models/../{model}/infer",
        f"/v2/models/%2e%2e%2f{model}/infer",
        f"/v2/models/{model}/versions/../../x/infer",
        f"/v2/models/{model}/versions/99999999999999999999/infer",
        f"/v2/models/{model}/versions/0/infer",
        "/v2/models/none/infer",
        f"/v2/models/{'x' * 5000}/infer",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/metrics",
    ]
    body = {"parameters": {"config": "{}", "file:1/model.py": "aW1wb3J0IG9z"}, "inputs": []}
    method = _pick(random, ["POST", "GET", "PUT", "DELETE", "HEAD"])
    return http("paths", _pick(random, paths), _encoded(body), key, method=method)


def _large(random: np.random.Generator, model: str, key: str) -> FuzzRequest:
    """What ends the embedded server where nothing stands before it."""
    kind = int(random.integers(0, 4))
    path = _text_path(model)
    if kind == 0:
        return http("large", f"/v2/models/{model}/infer", b"[" * 200_000, key)
    if kind == 1:
        return http("large", path, _encoded({"text_input": "x" * 2_500_000}), key)
    if kind == 2:
        return http("large", path, _encoded({"text_input": "x", "stop": ["y"] * 50_000}), key)
    return http("large", "/v1/completions", _encoded({"model": model, "prompt": ["x"] * 3000, "n": 16}), key)
