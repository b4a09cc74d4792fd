"""What the client says of answers that are none, from a server that sends the bytes that it is given."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from flows.serving.client import BROKEN, Client, Transport

PAGE = b"<html><body><h1>503 Service Unavailable</h1>\nNo server is available."
PIECE = (
    b'data: {"text_output": "a", "finish_reason": "", "prompt_tokens": 1, "completion_tokens": 1, "model_version": "1"}'
)
OUTPUTS = [
    ("text_output", "BYTES", b"\x01\x00\x00\x00a"),
    ("finish_reason", "BYTES", b"\x00\x00\x00\x00"),
    ("prompt_tokens", "INT32", b"\x01\x00\x00\x00"),
    ("completion_tokens", "INT32", b"\x01\x00\x00\x00"),
]
"""Of a piece over gRPC: name, type and bytes."""
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
        (
            b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
            BROKEN,
            r"broke off after 0 pieces \(HTTP 502 Bad Gateway\)",
        ),
        (CHUNKED + 2 * chunk(PIECE + b"\n\n"), BROKEN, r"broke off after 2 pieces \(HTTP 200 OK\). Ask again."),
        (
            CHUNKED + chunk(PIECE + b"\n\n") + chunk(PIECE)[:40],
            BROKEN,
            r"broke off after 1 pieces \(HTTP 200 OK\)",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + PIECE.removeprefix(b"data: "),
            BROKEN,
            r"broke off after 1 pieces \(HTTP 200 OK\)",
        ),
    ],
    ids=["a page", "a number", "nothing", "a stream's beginning", "part of a piece", "a text's beginning"],
)
def test_an_answer_that_is_none_is_named(answer: bytes, status: str, told: str) -> None:
    with answering(answer) as address, Client(Transport.http, address) as client:
        with pytest.raises(InferenceServerException, match=told) as raised:
            list(client.stream("m_text", "def"))
        assert raised.value.status() == status


class Cut(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Sends some pieces and ends with a status, as a proxy does whose server has gone."""

    def __init__(self, pieces: int, code: grpc.StatusCode) -> None:
        self._pieces, self._code = pieces, code

    def ModelStreamInfer(self, requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        next(requests)
        for _ in range(self._pieces):
            response = service_pb2.ModelInferResponse(model_name="m_text", model_version="1")
            for name, datatype, raw in OUTPUTS:
                response.outputs.add(name=name, datatype=datatype, shape=[1])
                response.raw_output_contents.append(raw)
            yield service_pb2.ModelStreamInferResponse(infer_response=response)
        context.abort(self._code, "Stream removed")


@pytest.mark.parametrize(
    ("pieces", "code", "told"),
    [
        (2, grpc.StatusCode.CANCELLED, r"broke off after 2 pieces \(Stream removed\). Ask again."),
        (1, grpc.StatusCode.UNAVAILABLE, r"broke off after 1 pieces \(Stream removed\). Ask again."),
        (0, grpc.StatusCode.CANCELLED, r"broke off after 0 pieces \(Stream removed\). Ask again."),
        (0, grpc.StatusCode.UNAVAILABLE, "^.StatusCode.UNAVAILABLE. Stream removed$"),  # or what a model refuses with
    ],
)
def test_a_grpc_stream_that_is_cut_is_named(pieces: int, code: grpc.StatusCode, told: str) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Cut(pieces, code), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(Transport.grpc, f"127.0.0.1:{port}") as client:
        with pytest.raises(InferenceServerException, match=told) as raised:
            list(client.stream("m_text", "def"))
        assert raised.value.status() == BROKEN
    server.stop(None).wait()
