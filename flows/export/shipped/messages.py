"""Named arrays from one process to another over a socket: sizes and types as JSON, then the bytes."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np

LENGTH_BYTES = 4


class EndedError(OSError):
    """The other side has ended."""


def send(to: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends arrays by name; OSError if nobody receives any more."""
    arrays = [np.ascontiguousarray(array) for array in message.values()]
    described = [(name, one.dtype.str, one.shape) for name, one in zip(message, arrays, strict=True)]
    header = json.dumps(described).encode()
    to.sendall(len(header).to_bytes(LENGTH_BYTES, "little") + header)
    for array in arrays:
        if array.size:
            to.sendall(array.reshape(-1).data.cast("B"))


def receive(source: socket.socket) -> dict[str, Any]:
    """The next message; `EndedError` if there is none."""
    header = _receive_into(source, bytearray(int.from_bytes(_receive_into(source, bytearray(LENGTH_BYTES)), "little")))
    message = {}
    for name, dtype, shape in json.loads(header):
        array = np.empty(shape, np.dtype(dtype))
        if array.size:
            _receive_into(source, array.reshape(-1).view(np.uint8))
        message[name] = array
    return message


def _receive_into(source: socket.socket, buffer: Any) -> Any:
    rest = memoryview(buffer)
    while rest:
        count = source.recv_into(rest)
        if not count:
            raise EndedError("the other side has ended")
        rest = rest[count:]
    return buffer
