"""What the client says of answers that are none, from a server that sends the bytes that it is given."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tritonclient.utils import InferenceServerException

from flows.serving.client import BROKEN, Client, Transport

PAGE = b"<html><body><h1>503 Service Unavailable</h1>\nNo server is available."
PIECE = (
    b'data: {"text_output": "a", "finish_reason": "", "prompt_tokens": 1, "completion_tokens": 1, "model_version": "1"}'
)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(line: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(line), line)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of a server that sends this to its first client and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        (
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n%b" % (len(PAGE), PAGE),
            "503",
            "HTTP 503 Service Unavailable, with what is no JSON object: '<html><body><h1>503 Service Unavailable</h1>",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n17", "200", "HTTP 200 OK, with what is no JSON object: '17'"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", BROKEN, "HTTP 502 Bad Gateway: .* after 0 pieces"),
        (CHUNKED + 2 * chunk(PIECE + b"\n\n"), BROKEN, "HTTP 200 OK: the answer broke off after 2 pieces. Ask again."),
        (
            CHUNKED + chunk(PIECE + b"\n\n") + chunk(PIECE)[:40],
            BROKEN,
            "HTTP 200 OK: the answer broke off after 1 pieces",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + PIECE.removeprefix(b"data: "),
            BROKEN,
            "HTTP 200 OK: the answer broke off after 1 pieces",
        ),
    ],
    ids=["a page", "a number", "nothing", "a stream's beginning", "part of a piece", "a text's beginning"],
)
def test_an_answer_that_is_none_is_named(answer: bytes, status: str, told: str) -> None:
    with answering(answer) as address, Client(Transport.http, address) as client:
        with pytest.raises(InferenceServerException, match=told) as raised:
            list(client.stream("m_text", "def"))
        assert raised.value.status() == status
