"""What clients of an OpenAI-compatible interface may ask for; what cannot be done is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flows.export.shipped.given_text import MOST_ALTERNATIVES

MAX_CHOICES = 128
"""Texts of one request: prompts times `n`."""
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63 - MAX_CHOICES)]
Texts = str | list[str] | list[Int64] | list[list[Int64]]
"""A text, its tokens, or several of either."""


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def _as_texts(given: Texts) -> list[str] | list[list[int]]:
    """Each text, or its tokens."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]
    return given  # type: ignore[return-value]


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Request(BaseModel):
    """What completions of texts and of chats have in common."""

    model_config = ConfigDict(extra="forbid")
    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(default=1, ge=1, le=16)
    stop: Annotated[list[str], BeforeValidator(_as_list)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: Int64 | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: None = None
    user: str | None = None
    """Ignored, like `metadata` and `store`."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    top_k: Int32 = 0
    """Beyond OpenAI's interface, as is `repetition_penalty`."""
    repetition_penalty: float = 1.0

    @property
    def wants_log_probabilities(self) -> bool:
        """Whether each token comes with its log-probability."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens come with each."""
        raise NotImplementedError


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: Texts
    max_tokens: Int32 = 16
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    """Log-probabilities of the tokens, and of so many of the likeliest at each place."""
    echo: bool = False
    """The text begins with the prompt; with `logprobs`, its tokens have theirs, and `max_tokens=0` scores it alone."""
    best_of: Literal[1] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"prompts times n must not exceed {MAX_CHOICES}")
        if self.echo and self.stream:
            raise ValueError("echo cannot be had as a stream; ask for the whole")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each text to continue, or its tokens."""
        return _as_texts(self.prompt)

    @property
    def wants_log_probabilities(self) -> bool:
        """Whether each token comes with its log-probability."""
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens come with each."""
        return self.logprobs or 0


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid")
    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    user: str | None = None
    """Ignored."""

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        if not 0 < len(self.texts) <= MAX_CHOICES:
            raise ValueError(f"input must hold 1 to {MAX_CHOICES} texts")
        return self

    @property
    def texts(self) -> list[str] | list[list[int]]:
        """Each text, or its tokens."""
        return _as_texts(self.input)


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: None = None

    @property
    def text(self) -> str:
        """Its content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Int32 | None = None
    max_completion_tokens: Int32 | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: None = None
    tool_choice: None = None

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def wants_log_probabilities(self) -> bool:
        """Whether each token comes with its log-probability."""
        return self.logprobs

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens come with each."""
        return self.top_logprobs or 0
