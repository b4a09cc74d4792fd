"""The public endpoint: what may be reached from outside of the inference server, and in what amounts.

Health, metadata and inference of models pass, once read and checked; loading of models, shared memory, traces and logs
do not. Bodies have a limit, whatever they are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serving.public_endpoint.guarded_request import (
    RefusedError,
    check_names,
    guard_generate,
    guard_infer,
    read_json,
)

HEADER_LENGTH = "inference-header-content-length"
PASSED_BACK = ("content-type", HEADER_LENGTH)
TIMEOUT = httpx.Timeout(120.0, connect=10.0)
DRAINED = 8
"""A body is read to its end, and thrown away, up to so many times the longest one; then its sender is cut off."""
BODY_TIMEOUT_S = 60.0
JSON_TYPE = b"application/json"
NO_JSON = "Content-Type must be application/json: curl -H 'Content-Type: application/json'."
DOWN = "The inference server does not answer. Try again later."
CLOSED = "There is nothing here, or it is closed."


class BodyGuard:
    """Answers 413 to a body that is too long, 415 to one that is compressed or not called JSON, 400 to none.

    Args:
        app: What answers the others.
        max_bytes: Longest body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on while it is short enough."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if headers.get(b"content-encoding", b"identity") != b"identity":
            await _refuse(scope, 415, "Content-Encoding must be identity: send the body as it is.")(
                scope, receive, send
            )
            return
        body = await self._read(receive, int(headers.get(b"content-length", b"0")))
        if body is None:
            return
        if isinstance(body, tuple):
            await _refuse(scope, *body)(scope, receive, send)
            return
        try:
            if scope["method"] == "POST" and scope["path"].startswith("/v1"):
                # what a page of another site may send unasked is of other kinds
                if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != JSON_TYPE:
                    await _refuse(scope, 415, NO_JSON)(scope, receive, send)
                    return
                read_json(body)
        except RefusedError as error:
            await _refuse(scope, 400, f"{error}.")(scope, receive, send)
            return
        was_read = False

        async def again() -> Message:
            nonlocal was_read
            if was_read:
                return await receive()
            was_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)

    async def _read(self, receive: Receive, stated: int) -> bytes | tuple[int, str] | None:
        """The body; or why there is none to be had, as status and message; None if its sender has gone."""
        too_long = 413, f"The body is longer than the {self._max_bytes} bytes that may be (serve.max_body_bytes)."
        if stated > DRAINED * self._max_bytes:
            return too_long
        body, length, is_whole = b"", 0, False
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while not is_whole and length <= DRAINED * self._max_bytes:  # who is cut off sees no answer
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    length += len(part)
                    body = body + part if length <= self._max_bytes else b""
                    is_whole = not message.get("more_body", False)
        except TimeoutError:
            return 408, f"The body did not arrive within {BODY_TIMEOUT_S:g} s."
        return body if length <= self._max_bytes else too_long


def _refuse(scope: Scope, code: int, message: str) -> JSONResponse:
    message = message.encode(errors="replace").decode()
    if scope["path"].startswith("/v1"):
        kind = "invalid_request_error"
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, code)
    return JSONResponse({"error": message}, code)


def add_guarded_routes(app: FastAPI, http_address: str) -> None:
    """Adds the endpoints below `/v2` that are open to others.

    Args:
        app: The public application, which asks for keys.
        http_address: `host:port` of the inference server.
    """
    # no connection is kept: one that is idle holds up the server's exit; so there is nothing to close either
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    server = httpx.AsyncClient(base_url=f"http://{http_address}", timeout=TIMEOUT, limits=limits, trust_env=False)

    async def ask(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Response:
        try:
            answer = await server.request(method, path, content=body, headers=headers)
        except httpx.HTTPError:
            return JSONResponse({"error": DOWN}, 503)
        if answer.status_code >= 500:  # a model's process is gone, for instance; what it says of itself is for the log
            return JSONResponse({"error": DOWN}, 503)
        kept = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers}
        return Response(answer.content, answer.status_code, kept)

    @app.exception_handler(RefusedError)
    async def refuse(request: HttpRequest, error: RefusedError) -> JSONResponse:
        return _refuse(request.scope, 400, f"{error}.")

    @app.get("/v2")
    @app.get("/v2/health/live")
    @app.get("/v2/health/ready")
    async def health(request: HttpRequest) -> Response:
        return await ask("GET", request.url.path)

    @app.get("/v2/models/{model}")
    @app.get("/v2/models/{model}/ready")
    @app.get("/v2/models/{model}/versions/{version}")
    @app.get("/v2/models/{model}/versions/{version}/ready")
    async def look(request: HttpRequest, model: str, version: str | None = None) -> Response:
        check_names(model, version)
        path = _path(model, version)
        return await ask("GET", f"{path}/ready" if request.url.path.endswith("/ready") else path)

    @app.post("/v2/models/{model}/infer")
    @app.post("/v2/models/{model}/versions/{version}/infer")
    async def infer(request: HttpRequest, model: str, version: str | None = None) -> Response:
        check_names(model, version)
        body, length = guard_infer(await request.body(), request.headers.get(HEADER_LENGTH))
        headers = {} if length is None else {HEADER_LENGTH: str(length)}
        return await ask("POST", f"{_path(model, version)}/infer", body, headers)

    @app.post("/v2/models/{model}/generate")
    @app.post("/v2/models/{model}/versions/{version}/generate")
    async def generate(request: HttpRequest, model: str, version: str | None = None) -> Response:
        check_names(model, version)
        return await ask("POST", f"{_path(model, version)}/generate", guard_generate(await request.body()))

    @app.post("/v2/models/{model}/generate_stream")
    @app.post("/v2/models/{model}/versions/{version}/generate_stream")
    async def generate_stream(request: HttpRequest, model: str, version: str | None = None) -> Response:
        check_names(model, version)
        path, body = f"{_path(model, version)}/generate_stream", guard_generate(await request.body())
        try:
            answer = await server.send(server.build_request("POST", path, content=body), stream=True)
        except httpx.HTTPError:
            return JSONResponse({"error": DOWN}, 503)
        kept = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers}
        return StreamingResponse(_pieces(answer), answer.status_code, kept)

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
    async def closed(request: HttpRequest, path: str) -> JSONResponse:
        return _refuse(request.scope, 404, CLOSED)


async def _pieces(answer: Any) -> AsyncIterator[bytes]:
    """What the server sends, as it comes; a client that hangs up takes the server's request along."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    except httpx.HTTPError:
        yield f'data: {{"error": "{DOWN}"}}\n\n'.encode()
    finally:
        await answer.aclose()


def _path(model: str, version: str | None) -> str:
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
