"""What clients of an OpenAI-compatible interface may ask for; what cannot be done is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator, model_validator

from flows.export.shipped.given_text import MOST_ALTERNATIVES

MAX_CHOICES = 128
"""Texts of one request: prompts times `n`."""
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63 - MAX_CHOICES)]


def _one_rule(rule: str) -> WrapValidator:
    """What is said in place of one sentence for each form that something might have had."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            raise ValueError(rule) from error

    return WrapValidator(check)


def _nothing(value: Any) -> None:
    if value:
        raise ValueError("is not offered here. Leave it out")


Texts = Annotated[
    str | list[str] | list[Int64] | list[list[Int64]], _one_rule("must be a text, its tokens, or a list of either")
]
"""A text, its tokens, or several of either."""
Nothing = Annotated[None, BeforeValidator(_nothing)]
"""Of what cannot be done: null, or empty."""


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def _as_role(value: Any) -> Any:
    return "system" if value == "developer" else value  # its newer name


def _as_texts(given: Texts) -> list[str] | list[list[int]]:
    """Each text, or its tokens."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]
    return given  # type: ignore[return-value]


class Body(BaseModel):
    """Part of a request: what is not known is refused, null is as good as left out."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = False


class Request(Body):
    """What completions of texts and of chats have in common."""

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
    logit_bias: Nothing = None
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
    suffix: Nothing = None

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        if not 0 < len(self.prompts) * self.n <= MAX_CHOICES:
            raise ValueError(f"prompts times n must lie between 1 and {MAX_CHOICES}")
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


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Nothing = None
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


class ChatMessage(Body):
    """One turn."""

    role: Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(_as_role)]
    content: Annotated[str | list[TextPart], _one_rule("must be a text, or a list of parts of type text")]
    name: Nothing = None

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
    tools: Nothing = None
    tool_choice: Literal["none"] | None = None

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
