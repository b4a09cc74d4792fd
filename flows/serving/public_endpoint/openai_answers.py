"""How the answers of an interface like OpenAI's look, made from what the text model sends."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.export.shipped.given_text import token_places
from flows.serving.public_endpoint.chat_prompt import ChatPrompt
from flows.serving.public_endpoint.openai_requests import ChatRequest, CompletionRequest, EmbeddingRequest, Request


@dataclass
class Scored:
    """Tokens that follow each other, with what the model thought of them."""

    ids: list[int]
    log_probabilities: list[float | None]
    """None: the first token of a text, for which there is nothing to go by."""
    alternatives: list[list[tuple[int, float]]]
    """For each token the likeliest ones in its place, the likeliest first."""


@dataclass
class Piece:
    """What one response of the text model adds to one choice."""

    choice: int
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    new: Scored
    prompt: Scored
    """Empty unless asked for."""
    embedding: NDArray[np.float32] | None


@dataclass(frozen=True)
class Form:
    """How the answers of one endpoint look."""

    prefix: str
    whole: str
    chunk: str
    choice: Callable[[Piece, ChatPrompt, Any, bool], dict[str, Any]]


def read_piece(choice: int, answer: Mapping[str, Any]) -> Piece:
    """A response of the text model, its outputs by name."""
    return Piece(
        choice=choice,
        text=answer["text_output"],
        finish_reason=answer["finish_reason"],
        prompt_tokens=answer["prompt_tokens"],
        completion_tokens=answer["completion_tokens"],
        new=_read_scored(answer, ""),
        prompt=_read_scored(answer, "prompt_"),
        embedding=answer.get("embedding"),
    )


def _read_scored(answer: Mapping[str, Any], kind: str) -> Scored:
    ids = np.atleast_1d(answer.get(f"{kind}token_ids", [])).tolist()
    values = np.atleast_1d(answer.get(f"{kind}log_probabilities", [])).tolist()
    places = zip(
        answer.get(f"{kind}top_token_ids", np.zeros((len(values), 0), np.int64)).tolist(),
        answer.get(f"{kind}top_log_probabilities", np.zeros((len(values), 0))).tolist(),
        strict=True,
    )
    without = len(ids) - len(values)
    alternatives = [list(zip(tokens, those, strict=True)) for tokens, those in places]
    return Scored(ids, [None] * without + values, [[]] * without + alternatives)


def text_choice(piece: Piece, chat: ChatPrompt, request: CompletionRequest, is_chunk: bool) -> dict[str, Any]:
    """A choice of /v1/completions."""
    text = piece.text
    if request.echo:
        prompt = request.prompts[piece.choice // request.n]
        text = (prompt if isinstance(prompt, str) else chat.decode(prompt)) + text
    return {
        "index": piece.choice,
        "text": text,
        "logprobs": _text_log_probabilities(piece, chat, request, is_chunk),
        "finish_reason": piece.finish_reason or None,
    }


def _text_log_probabilities(
    piece: Piece, chat: ChatPrompt, request: CompletionRequest, is_chunk: bool
) -> dict[str, Any] | None:
    if not request.wants_log_probabilities:
        return None
    ids = piece.prompt.ids + piece.new.ids
    values = piece.prompt.log_probabilities + piece.new.log_probabilities
    tops: list[dict[str, float] | None] = []
    for token, value, alternatives in zip(ids, values, piece.prompt.alternatives + piece.new.alternatives, strict=True):
        top: dict[str, float] = {}
        for other, of_other in [*alternatives, *([] if value is None else [(token, value)])]:
            top.setdefault(chat.spelling(other), of_other)  # of tokens that are spelled alike, the likeliest
        tops.append(None if value is None else top)
    return {
        "tokens": [chat.spelling(token) for token in ids],
        "token_logprobs": values,
        "top_logprobs": tops if request.alternatives else None,
        "text_offset": [] if is_chunk else token_places(chat.decode, ids),
    }


def chat_choice(piece: Piece, chat: ChatPrompt, request: ChatRequest, is_chunk: bool) -> dict[str, Any]:
    """A choice of /v1/chat/completions."""

    def described(token: int, value: float | None) -> dict[str, Any]:
        text = chat.spelling(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    log_probabilities = None
    if request.wants_log_probabilities:
        rows = zip(piece.new.ids, piece.new.log_probabilities, piece.new.alternatives, strict=True)
        log_probabilities = {
            "content": [
                {**described(token, value), "top_logprobs": [described(*other) for other in alternatives]}
                for token, value, alternatives in rows
            ]
        }
    return {
        "index": piece.choice,
        "delta" if is_chunk else "message": {"role": "assistant", "content": piece.text},
        "logprobs": log_probabilities,
        "finish_reason": piece.finish_reason or None,
    }


def embedding_list(pieces: Sequence[Piece], request: EmbeddingRequest) -> dict[str, Any]:
    """The answer of /v1/embeddings."""
    data = []
    for piece in pieces:
        assert piece.embedding is not None
        vector = np.atleast_1d(piece.embedding)
        coded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append(
            {
                "object": "embedding",
                "index": piece.choice,
                "embedding": coded if request.encoding_format == "base64" else vector.tolist(),
            }
        )
    tokens = sum(piece.prompt_tokens for piece in pieces)
    return {
        "object": "list",
        "data": data,
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def usage(pieces: Sequence[Piece], request: Request) -> dict[str, int]:
    """Tokens of all choices."""
    prompt = sum(piece.prompt_tokens for piece in pieces) // request.n
    completion = sum(piece.completion_tokens for piece in pieces)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
