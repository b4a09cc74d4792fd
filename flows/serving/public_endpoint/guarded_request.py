"""Reads a request to a model and refuses, by name, what would end the embedded inference server or what nobody needs.

2.51 ends when a JSON body of 5 MB arrives, or a shape whose product overflows; it and we may read a repeated key
differently. So a request is read whole, checked, and written anew: what arrives at the server is what was checked.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any

from flows.config.serving import MODEL_NAME

MAX_ELEMENTS = 1 << 20
"""Of one tensor."""
MAX_DIMENSIONS, MAX_TENSORS = 8, 32
ITEM_BYTES = {"BOOL": 1, "INT32": 4, "INT64": 8, "FP32": 4}
"""Of the types that models here have, besides BYTES."""
KINDS: Mapping[str, tuple[type, ...]] = {
    "BOOL": (bool,),
    "INT32": (int,),
    "INT64": (int,),
    "FP32": (int, float),
    "BYTES": (str,),
}
INT_BITS = {"INT32": 31, "INT64": 63}
TENSOR_KEYS = {"name", "shape", "datatype", "data", "parameters"}
OUTPUT_KEYS = {"name", "parameters"}
ID_LENGTH = 256


class RefusedError(ValueError):
    """What is wrong with a request."""


def check_names(model: str, version: str | None) -> None:
    """Refuses names and numbers that could not be a model's or a version's; such a path leads nowhere else."""
    if not re.fullmatch(MODEL_NAME, model):
        raise RefusedError(f"{model!r:.80} is not a name of a model")
    if version is not None and not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise RefusedError(f"{version!r:.80} is not a number of a version")


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds: UTF-8, no key twice, no NaN, no half characters, not nested without end.

    Raises:
        RefusedError: It is not that; the message says what is wrong. So for all functions here.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise RefusedError("the body is nested too deep") from error
    except UnicodeError as error:
        raise RefusedError("the body is not UTF-8, or spells half of a character (a lone surrogate)") from error
    except ValueError as error:
        raise RefusedError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RefusedError("the body is not a JSON object")
    return value


def guard_generate(body: bytes) -> bytes:
    """The body of a `generate` request: a flat object of texts, numbers and lists of them."""
    request = read_json(body)
    for name, value in request.items():
        values = value if isinstance(value, list) else [value]
        _require(len(values) <= MAX_ELEMENTS, f"{name} has {len(values)} values; {MAX_ELEMENTS} may be")
        for one in values:
            _require(isinstance(one, str | bool | int | float), f"{name} must be a text, a number or a list of these")
            _require(not isinstance(one, int) or abs(one) < 2**63, f"{name} is beyond 64 bits")
            _require(not isinstance(one, float) or math.isfinite(one), f"{name} is not finite")
    return json.dumps(request).encode()


def guard_infer(body: bytes, header_length: str | None) -> tuple[bytes, int | None]:
    """The body of an `infer` request, and how much of it is JSON if raw tensors follow.

    Args:
        body: JSON, then raw tensors.
        header_length: What the client says how much of it is JSON; None = all.
    """
    if header_length is not None and not re.fullmatch(r"[0-9]{1,9}", header_length):
        raise RefusedError("Inference-Header-Content-Length is not a number")
    length = len(body) if header_length is None else int(header_length)
    _require(0 < length <= len(body), f"Inference-Header-Content-Length is {length} of {len(body)} bytes")
    request, raw = read_json(body[:length]), memoryview(body)[length:]
    _require(request.keys() <= {"id", "inputs", "outputs", "parameters"}, f"{sorted(request)} are not its keys")
    request_id = request.get("id", "")
    _require(isinstance(request_id, str) and len(request_id) <= ID_LENGTH, f"id must be a text of {ID_LENGTH} at most")
    _check_parameters("the request", request.get("parameters", {}))
    inputs = _list(request, "inputs")
    _require(len(inputs) > 0, "inputs is missing")
    for tensor in inputs:
        raw = raw[_check_input(tensor, raw) :]
    _require(len(raw) == 0, f"{len(raw)} bytes follow the last tensor")
    for tensor in _list(request, "outputs"):
        _require(isinstance(tensor, dict) and tensor.keys() <= OUTPUT_KEYS, f"an output has {sorted(OUTPUT_KEYS)}")
        _require(isinstance(tensor.get("name"), str), "an output has no name")
        _check_parameters(tensor["name"], tensor.get("parameters", {}))
    written = json.dumps(request).encode()
    if header_length is None:
        return written, None
    return written + body[length:], len(written)


def _check_input(tensor: Any, raw: memoryview) -> int:
    """How many of the raw bytes are this tensor's."""
    _require(isinstance(tensor, dict) and tensor.keys() <= TENSOR_KEYS, f"an input has {sorted(TENSOR_KEYS)}")
    name, datatype, shape = (tensor.get(key) for key in ("name", "datatype", "shape"))
    _require(isinstance(name, str) and 0 < len(name) <= ID_LENGTH, "an input has no name")
    _require(datatype in KINDS, f"{name}: datatype must be one of {sorted(KINDS)}")
    _require(isinstance(shape, list) and 0 < len(shape) <= MAX_DIMENSIONS, f"{name}: 1 to {MAX_DIMENSIONS} dimensions")
    for dimension in shape:
        is_size = type(dimension) is int and 0 <= dimension <= MAX_ELEMENTS
        _require(is_size, f"{name}: a dimension must lie between 0 and {MAX_ELEMENTS}")
    elements = math.prod(shape)
    _require(elements <= MAX_ELEMENTS, f"{name} has {elements:.3g} elements; {MAX_ELEMENTS} may be")
    parameters = tensor.get("parameters", {})
    _check_parameters(name, parameters)
    size = parameters.get("binary_data_size")
    if size is None:
        _check_data(name, datatype, elements, tensor.get("data"))
        return 0
    _require("data" not in tensor, f"{name} has both data and binary_data_size")
    _require(isinstance(size, int) and 0 <= size <= len(raw), f"{name}: binary_data_size is more than follows")
    if datatype == "BYTES":
        _check_texts(name, elements, raw[:size])
    else:
        _require(size == elements * ITEM_BYTES[datatype], f"{name}: binary_data_size does not fit its shape")
    return int(size)


def _check_data(name: str, datatype: str, elements: int, data: Any) -> None:
    values, depth = data, 0
    _require(isinstance(values, list), f"{name} has no data")
    while values and isinstance(values[0], list):
        depth += 1
        _require(depth <= MAX_DIMENSIONS, f"{name}: data is nested too deep")
        _require(all(isinstance(one, list) for one in values), f"{name}: data is nested unevenly")
        values = [one for part in values for one in part]
    _require(len(values) == elements, f"{name}: data has {len(values)} elements, its shape {elements}")
    for value in values:
        right = isinstance(value, KINDS[datatype]) and (datatype == "BOOL" or not isinstance(value, bool))
        _require(right, f"{name}: data must be {datatype}")
        if datatype in INT_BITS:
            _require(
                -(1 << INT_BITS[datatype]) <= value < 1 << INT_BITS[datatype], f"{name}: data is beyond {datatype}"
            )
        elif datatype == "FP32":
            _require(abs(value) <= 3.4e38, f"{name}: data is beyond FP32")


def _check_texts(name: str, elements: int, raw: memoryview) -> None:
    """Each text is four bytes of length, little-endian, and so many bytes."""
    place = count = 0
    while place < len(raw):
        _require(place + 4 <= len(raw), f"{name}: a text is cut off")
        (length,) = struct.unpack_from("<I", raw, place)
        place += 4 + length
        count += 1
    _require(place == len(raw) and count == elements, f"{name}: its texts do not fit its shape")


def _check_parameters(name: str, parameters: Any) -> None:
    _require(isinstance(parameters, dict) and len(parameters) <= MAX_TENSORS, f"{name}: parameters must be an object")
    for key, value in parameters.items():
        _require(not key.startswith("shared_memory"), f"{name}: shared memory is closed here")
        is_plain = isinstance(value, str | bool | int | float)
        _require(is_plain and (not isinstance(value, int) or abs(value) < 2**63), f"{name}: {key!r:.40} must be plain")


def _list(request: Mapping[str, Any], key: str) -> list[Any]:
    values = request.get(key, [])
    _require(isinstance(values, list) and len(values) <= MAX_TENSORS, f"{key} must be a list of {MAX_TENSORS} at most")
    return list(values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands there twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RefusedError(message)
