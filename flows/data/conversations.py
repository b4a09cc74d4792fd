"""Conversations: how a record becomes messages, and messages become tokens with loss on the answers alone.

The form is ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n` for each message, the end-of-text token at the end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from flows.config.checks import require
from flows.config.data import CorpusConfig, Format
from flows.data.cleaning import Dropped, cleaned

MESSAGE_START, MESSAGE_END = "<|im_start|>", "<|im_end|>"
ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT, "tool")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The same form in Jinja, as transformers' `apply_chat_template` reads it."""


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


def conversation_of(record: Any, config: CorpusConfig) -> str | Dropped:
    """The record's messages, cleaned, as JSON; or why there are none."""
    if not isinstance(record, dict):
        return Dropped.missing_field
    if config.format == Format.messages:
        turns = record.get(config.messages_field)
    else:
        asked, answered = record.get(config.prompt_field), record.get(config.completion_field)
        turns = [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": answered}]
    if turns is None or any(field not in record for field in config.fields):
        return Dropped.missing_field
    try:
        return _checked(turns, config)
    except UnicodeError:
        return Dropped.bad_utf8


def _checked(turns: Any, config: CorpusConfig) -> str | Dropped:
    messages: list[Message] = []
    for turn in turns if isinstance(turns, list) else [None]:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            return Dropped.not_a_conversation
        messages.append({"role": role, "content": cleaned(content, config.unicode_form)})
    if sum(len(message["content"].encode()) for message in messages) < config.min_document_bytes:
        return Dropped.too_short
    if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
        return Dropped.no_answer
    return json.dumps(messages, ensure_ascii=False)


def plain_text(conversation: str) -> str:
    """What the messages of a conversation (JSON) say, a line end after each."""
    return "".join(message["content"] + "\n" for message in json.loads(conversation))


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation as tokens."""

    ids: NDArray[Any]
    loss: NDArray[np.uint8]
    """1 where the token is to be predicted, as long as `ids`."""
    cut: bool
    """It was longer than allowed; what comes first is kept."""


def encode_conversations(
    tokenizer: Tokenizer,
    conversations: Sequence[str],
    eos_token_id: int,
    max_tokens: int | None,
    dtype: np.dtype[Any],
) -> list[EncodedConversation]:
    """Conversations (JSON) as tokens, the same ones that their text in `CHAT_TEMPLATE` gives.

    Loss is taken on what the assistant writes and on what closes its turn: the end of the message, the line end, and
    the end-of-text token if the turn is the last. A text that spells a special token is ordinary text.

    Args:
        tokenizer: With the tokens `<|im_start|>` and `<|im_end|>`.
        conversations: Messages as JSON.
        eos_token_id: Token that closes a conversation.
        max_tokens: Longer conversations are cut to as many; None = none is.
        dtype: Of the ids.

    Raises:
        ConfigError: The tokenizer lacks the special tokens.
    """
    start, end = (special_token(tokenizer, token) for token in (MESSAGE_START, MESSAGE_END))
    messages = [json.loads(conversation) for conversation in conversations]
    texts = [f"{turn['role']}\n{turn['content']}" for turns in messages for turn in turns]
    encodings = iter(tokenizer.encode_batch([*texts, "\n"], add_special_tokens=False))
    line_end = tokenizer.encode("\n", add_special_tokens=False).ids
    encoded = []
    for turns in messages:
        ids: list[int] = []
        loss: list[bool] = []
        for turn in turns:
            encoding, header = next(encodings), len(turn["role"]) + 1
            answers = turn["role"] == ASSISTANT
            ids += [start, *encoding.ids, end, *line_end]
            loss += [False, *(answers and first >= header for first, _ in encoding.offsets)]
            loss += [answers] * (1 + len(line_end))
        ids.append(eos_token_id)
        loss.append(turns[-1]["role"] == ASSISTANT)
        encoded.append(
            EncodedConversation(
                np.array(ids[:max_tokens], dtype),
                np.array(loss[:max_tokens], np.uint8),
                max_tokens is not None and len(ids) > max_tokens,
            )
        )
    return encoded


def special_token(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token.

    Raises:
        ConfigError: The tokenizer has none of that name.
    """
    index: int | None = tokenizer.token_to_id(token)
    require(
        index is not None,
        "data.corpus.format",
        "messages",
        f"needs the token {token}, which the tokenizer does not have",
        "Leave data.tokenizer.directory unset, or name a tokenizer with ChatML's tokens.",
    )
    assert index is not None
    return index
