# mypy: disable-error-code="no-untyped-call, import-untyped"
"""An HTTP interface like OpenAI's in front of the inference server: completions, chat completions, embeddings, models.

Requests become requests to the text model over gRPC; a client that hangs up cancels its text.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as grpc  # has no types
from fastapi import Depends, FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from grpc.aio import AioRpcError
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from flows.serving.client import BROKEN, CUT, as_arrays, as_values, given_text
from flows.serving.public_endpoint.chat_prompt import ChatPrompt, ControlTokenError
from flows.serving.public_endpoint.openai_answers import (
    Form,
    Piece,
    chat_choice,
    embedding_list,
    read_piece,
    text_choice,
    usage,
)
from flows.serving.public_endpoint.openai_requests import ChatRequest, CompletionRequest, EmbeddingRequest, Request
from flows.serving.releases.state import read_aliases
from flows.serving.repository import TEXT_SUFFIX, published_names

REPEATS = 5
STATUS_BY_MESSAGE = {"wait already": 429, "timeout_ms has passed": 504, "is not found": 404, "not ready": 404}

STATUS_BY_CODE = {"StatusCode.UNAVAILABLE": 503, "StatusCode.INTERNAL": 503, "StatusCode.CANCELLED": 503}
"""Of what the text model does not word itself: the server is gone, or a part of it."""


def make_app(grpc_address: str, repository: Path, keys: Sequence[str] = ()) -> FastAPI:
    """The interface.

    Args:
        grpc_address: `host:port` of the inference server.
        repository: Its model repository; models that are published later are found.
        keys: One of which requests must carry as `Authorization: Bearer`; empty = none is asked for.
    """

    def check_key(request: HttpRequest) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if keys and not any([hmac.compare_digest(given.encode(), key.encode()) for key in keys]):
            raise HTTPException(401, "The key in the Authorization header is not one of those that may use this.")

    app = FastAPI(title="Millrace", dependencies=[Depends(check_key)], docs_url=None, redoc_url=None, openapi_url=None)
    chats: dict[Path, ChatPrompt] = {}

    def chat_of(model: str) -> ChatPrompt:
        version = read_aliases(repository, model).live if model in published_names(repository) else None
        if version is None:
            raise HTTPException(404, f"The model {model!r} does not exist. There are {published_names(repository)}.")
        place = repository / f"{model}{TEXT_SUFFIX}" / str(version)
        if place not in chats:
            chats.clear()
            chats[place] = ChatPrompt(place)
        return chats[place]

    @app.exception_handler(HTTPException)
    async def refuse(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return JSONResponse(_error(str(error.detail), error.status_code), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        said = first["msg"].removeprefix("Value error, ")
        return JSONResponse(_error(f"{place}: {said}" if place else said, 400, place or None), 400)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(repository, name) for name in published_names(repository)]}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        chat_of(model)
        return _described(repository, model)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> Any:
        chat = chat_of(request.model)
        form = Form("cmpl", "text_completion", "text_completion", text_choice)
        for prompt in request.prompts:
            _check_length("prompt has", await chat.count(prompt), request.max_tokens, chat)
        inputs = [
            {
                **given_text(prompt),  # first: the proxy finds the replica by it
                **_options(request, request.stop, request.max_tokens, number),
                "prompt_log_probabilities": request.echo and request.wants_log_probabilities,
            }
            for prompt in request.prompts
            for number in range(request.n)
        ]
        return await _answer(grpc_address, request, inputs, form, chat)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Any:
        chat = chat_of(request.model)
        try:
            messages = [{"role": message.role, "content": message.text} for message in request.messages]
            ids = await asyncio.to_thread(chat.encode, messages)  # a long one beside the requests of others
        except ControlTokenError as error:
            raise HTTPException(400, f"{error}. Leave it out.") from error
        given = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        most = chat.room_behind(len(ids)) if given is None else given
        _check_length("messages have", len(ids), most, chat)
        form = Form("chatcmpl", "chat.completion", "chat.completion.chunk", chat_choice)
        stops = [*request.stop, *chat.stops]
        inputs = [{"input_ids": ids, **_options(request, stops, most, number)} for number in range(request.n)]
        return await _answer(grpc_address, request, inputs, form, chat)

    @app.post("/v1/embeddings")
    async def embeddings(request: EmbeddingRequest) -> Any:
        chat_of(request.model)
        inputs = [{**given_text(text), "embedding": True} for text in request.texts]
        return embedding_list(await _whole(grpc_address, request.model, inputs), request)

    return app


def _check_length(what: str, tokens: int, max_tokens: int, chat: ChatPrompt) -> None:
    """Refuses what the text model would cut off at its beginning; it refuses by itself too many new tokens."""
    if max_tokens <= chat.max_new_tokens and tokens > (most := chat.room_before(max_tokens)):
        raise HTTPException(
            400,
            f"The {what} {tokens} tokens; with max_tokens={max_tokens}, the model reads {most} at most. Shorten "
            "what it has to read, or ask for fewer tokens.",
        )


def _options(request: Request, stops: Sequence[str], max_tokens: int, number: int) -> dict[str, Any]:
    seed = {} if request.seed is None else {"seed": request.seed + number}
    return {
        "max_tokens": max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "repetition_penalty": request.repetition_penalty,
        "log_probabilities": request.wants_log_probabilities,
        "top_log_probabilities": request.alternatives,
        "stream": request.stream,
        "stop": list(stops),
        **seed,
    }


async def _answer(
    address: str, request: Request, inputs: Sequence[dict[str, Any]], form: Form, chat: ChatPrompt
) -> Any:
    head = {
        "id": f"{form.prefix}-{uuid.uuid4().hex}",
        "object": form.chunk if request.stream else form.whole,
        "created": int(time.time()),
        "model": request.model,
    }
    if request.stream:
        pieces = _generate(address, f"{request.model}{TEXT_SUFFIX}", inputs)
        first = await _first(pieces)  # an error before the first piece is an HTTP status, not a broken stream
        return StreamingResponse(_events(first, pieces, head, form, chat, request), media_type="text/event-stream")
    answers = await _whole(address, request.model, inputs)
    choices = [form.choice(piece, chat, request, False) for piece in answers]
    return {**head, "choices": choices, "usage": usage(answers, request)}


async def _whole(address: str, model: str, inputs: Sequence[dict[str, Any]]) -> list[Piece]:
    """What the text model answers to each, in their order."""
    try:
        pieces = [piece async for piece in _generate(address, f"{model}{TEXT_SUFFIX}", inputs)]
    except InferenceServerException as error:
        raise _http_error(error) from error
    return sorted(pieces, key=lambda piece: piece.choice)


async def _first(pieces: AsyncIterator[Piece]) -> Piece:
    try:
        return await anext(pieces)
    except InferenceServerException as error:
        raise _http_error(error) from error


async def _events(
    first: Piece, pieces: AsyncIterator[Piece], head: dict[str, Any], form: Form, chat: ChatPrompt, request: Request
) -> AsyncIterator[str]:
    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body)}\n\n"

    last: dict[int, Piece] = {first.choice: first}
    yield event({**head, "choices": [form.choice(first, chat, request, True)]})
    try:
        async for piece in pieces:
            last[piece.choice] = piece
            yield event({**head, "choices": [form.choice(piece, chat, request, True)]})
    except InferenceServerException as error:
        yield event(_error(str(error.message()), _http_error(error).status_code))
        return
    if request.stream_options.include_usage:
        yield event({**head, "choices": [], "usage": usage(list(last.values()), request)})
    yield "data: [DONE]\n\n"


async def _generate(address: str, model: str, inputs: Sequence[dict[str, Any]]) -> AsyncIterator[Piece]:
    """Pieces of all choices as they come; asks again if the server goes away before the first, which a proxy cannot."""
    for repeats_left in reversed(range(REPEATS + 1)):
        has_begun = False
        try:
            async with aclosing(_ask(address, model, inputs)) as pieces:
                async for piece in pieces:
                    has_begun = True
                    yield piece
            return
        except InferenceServerException as error:
            if has_begun or error.status() != BROKEN or not repeats_left:
                raise


async def _ask(address: str, model: str, inputs: Sequence[dict[str, Any]]) -> AsyncGenerator[Piece]:
    """Pieces of all choices as they come; one connection, closed when nobody listens any more."""
    async with grpc.InferenceServerClient(address) as client:

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for number, one in enumerate(inputs):
                yield {"model_name": model, "inputs": _tensors(one), "request_id": str(number)}

        refusal = None
        responses = client.stream_infer(requests())
        try:  # to the end: a stream that is cut off for nothing delays the server's exit
            async for result, error in responses:
                refusal = refusal or error
                if error is None:
                    yield read_piece(int(result.get_response().id), as_values(result))
        except AioRpcError as error:  # the connection itself
            if str(error.code()) not in (BROKEN, CUT):
                raise InferenceServerException(str(error.details()), str(error.code())) from error
            told = f"The answer broke off, because the server went away: {error.details()}. Ask again."
            raise InferenceServerException(told, BROKEN) from error
        except BaseException:
            responses.cancel()
            raise
        if refusal is not None:
            raise refusal


def _tensors(inputs: dict[str, Any]) -> list[Any]:
    return [
        grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)).set_data_from_numpy(array)
        for name, array in as_arrays(inputs).items()
    ]


def _described(repository: Path, name: str) -> dict[str, Any]:
    created = int((repository / f"{name}{TEXT_SUFFIX}").stat().st_mtime)
    return {"id": name, "object": "model", "created": created, "owned_by": "millrace"}


def _http_error(error: InferenceServerException) -> HTTPException:
    message = str(error.message())
    otherwise = STATUS_BY_CODE.get(str(error.status()), 400)
    code = next((code for part, code in STATUS_BY_MESSAGE.items() if part in message), otherwise)
    return HTTPException(code, message if code != 503 else "The inference server does not answer. Try again later.")


def _error(message: str, code: int, parameter: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if code < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
