"""What a request must not be, before it is passed on; no server is needed to say so."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from flows.serving.drills.fuzz_requests import infer_body
from flows.serving.public_endpoint.guarded_request import (
    RefusedError,
    check_names,
    guard_generate,
    guard_infer,
    read_json,
)


def binary(ids: bytes, *, size: int = 16, shape: Any = (1, 2), datatype: str = "INT64") -> tuple[bytes, str]:
    """One tensor whose values follow the JSON, and the length of that."""
    tensor = {"name": "input_ids", "shape": list(shape), "datatype": datatype, "parameters": {"binary_data_size": size}}
    header = json.dumps({"inputs": [tensor]}).encode()
    return header + ids, str(len(header))


def test_what_is_right_passes_and_is_written_anew() -> None:
    body = infer_body([[1, 2]], [[1, 1]], [1, 2]) | {"id": "7", "outputs": [{"name": "logits"}]}
    written, length = guard_infer(b"  " + json.dumps(body, indent=3).encode(), None)
    assert (json.loads(written), length) == (body, None)
    raw = struct.pack("<2q", 5, 6)
    written, length = guard_infer(*binary(raw))
    assert length is not None
    assert written[length:] == raw
    texts = b"".join(struct.pack("<I", len(one)) + one for one in (b"ab", b""))
    assert guard_infer(*binary(texts, size=len(texts), shape=[2], datatype="BYTES"))[0].endswith(texts)
    body = {"text_input": "ä\U0001f600", "stop": ["a", "b"], "max_tokens": 3, "temperature": 0.5, "stream": True}
    assert json.loads(guard_generate(json.dumps(body).encode())) == body


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": 1, "a": 2}', "a key stands there twice"),
        (b'{"a": {"shape": [1], "shape": [2]}}', "a key stands there twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": "\\ud800"}', "half of a character"),
        (b'{"\\udfff": 1}', "half of a character"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_json_that_could_be_read_in_two_ways_is_refused(body: bytes, told: str) -> None:
    with pytest.raises(RefusedError, match=told):
        read_json(body)


@pytest.mark.parametrize(
    ("shape", "data", "datatype", "told"),
    [
        ([2**40, 2**40], [1], "INT64", "a dimension must lie between 0 and"),
        ([-1, 2], [1, 1], "INT64", "a dimension must lie between 0 and"),
        ([True, 2], [1, 1], "INT64", "a dimension must lie between 0 and"),
        ([1.0, 2], [1, 1], "INT64", "a dimension must lie between 0 and"),
        ([1 << 20, 2], [1], "INT64", "elements; 1048576 may be"),
        ([1] * 9, [1], "INT64", "1 to 8 dimensions"),
        ([], [], "INT64", "1 to 8 dimensions"),
        ([1, 3], [1, 2], "INT64", "data has 2 elements, its shape 3"),
        ([1, 2], [[1], 2], "INT64", "nested unevenly"),
        ([1, 1], [2**63], "INT64", "beyond INT64"),
        ([1, 1], [True], "INT64", "data must be INT64"),
        ([1, 1], [1.5], "INT64", "data must be INT64"),
        ([1, 1], [1e300], "FP32", "beyond FP32"),
        ([1, 1], [1], "FP64", "datatype must be one of"),
        ([1, 1], "x", "INT64", "has no data"),
    ],
)
def test_tensors_that_are_not_what_they_say_are_refused(shape: Any, data: Any, datatype: str, told: str) -> None:
    with pytest.raises(RefusedError, match=told):
        guard_infer(json.dumps(infer_body(data, data, shape, datatype)).encode(), None)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (binary(bytes(16), size=17), "binary_data_size is more than follows"),
        (binary(bytes(16), size=-1), "binary_data_size is more than follows"),
        (binary(bytes(16), size=8), "does not fit its shape"),
        (binary(bytes(20)), "4 bytes follow the last tensor"),
        (binary(struct.pack("<I", 99), size=4, shape=[1], datatype="BYTES"), "do not fit its shape"),
        (binary(struct.pack("<2I", 0, 0), size=8, shape=[3], datatype="BYTES"), "do not fit its shape"),
        (binary(b"\0\0", size=2, shape=[1], datatype="BYTES"), "a text is cut off"),
        ((binary(bytes(16))[0], "99999"), "is 99999 of"),
        ((binary(bytes(16))[0], "-1"), "is not a number"),
        ((binary(bytes(16))[0], "3"), "is not JSON"),
    ],
)
def test_raw_tensors_that_lie_about_their_size_are_refused(request_: tuple[bytes, str], told: str) -> None:
    with pytest.raises(RefusedError, match=told):
        guard_infer(*request_)


def test_shared_memory_and_unknown_keys_are_refused() -> None:
    body = infer_body([1], [1], [1, 1])
    body["inputs"][0]["parameters"] = {"binary_data_size": 0}
    with pytest.raises(RefusedError, match="has both data and binary_data_size"):
        guard_infer(json.dumps(body).encode(), None)
    body["inputs"][0]["parameters"] = {"shared_memory_region": "x"}
    with pytest.raises(RefusedError, match="shared memory is closed here"):
        guard_infer(json.dumps(body).encode(), None)
    with pytest.raises(RefusedError, match="are not its keys"):
        guard_infer(b'{"inputs": [], "model_name": "x"}', None)
    with pytest.raises(RefusedError, match="text_input has 1048577 values; 1048576 may be"):
        guard_generate(json.dumps({"text_input": [1] * (2**20 + 1)}).encode())
    for value in ({"a": 1}, [[1]], None, 2**63, 1e999):
        with pytest.raises(RefusedError):
            guard_generate(json.dumps({"text_input": value}).encode())


@pytest.mark.parametrize(
    ("model", "version"),
    [
        ("..", None),
        ("a/b", None),
        ("a%2fb", None),
        ("", None),
        ("a" * 65, None),
        ("a", "0"),
        ("a", "1/.."),
        ("a", "-1"),
    ],
)
def test_names_lead_nowhere_else(model: str, version: str | None) -> None:
    check_names("quickstart_text", "12")
    with pytest.raises(RefusedError, match="is not a n"):
        check_names(model, version)
