"""Messages of a chat to the tokens of a prompt, through the template and tokenizer that a served version carries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from flows.data.conversations import MESSAGE_END
from flows.data.tokenizer import CHAT_TEMPLATE_FILE, load_tokenizer


class ControlTokenError(ValueError):
    """A message spells a control token: it could speak for somebody else."""


class ChatPrompt:
    """How one served version reads a chat.

    Args:
        version_dir: `<repository>/<name>_text/<version>`.
    """

    def __init__(self, version_dir: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(version_dir / "tokenizer.json"))
        self._as_text = load_tokenizer(version_dir)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
        source = (version_dir / CHAT_TEMPLATE_FILE).read_text()
        self._template = environment.from_string(source)
        settings = json.loads((version_dir / "settings.json").read_text())
        self.max_new_tokens: int = settings["max_new_tokens"]
        self._sequence_length: int = settings["sequence_length"]
        self._end: str = settings["end_of_text"]
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._control = [token.content for token in added if token.special]
        self.stops = [MESSAGE_END] if MESSAGE_END in source else []
        """What ends the assistant's turn, besides the end of text."""

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of the chat so far and of the beginning of the assistant's turn.

        Raises:
            ControlTokenError: A message spells a control token.
        """
        for number, message in enumerate(messages):
            for token in self._control:
                if token in message["content"]:
                    raise ControlTokenError(f"messages[{number}].content spells the control token {token}")
        text = self._template.render(messages=messages, add_generation_prompt=True, eos_token=self._end, bos_token="")
        return _token_ids(self._tokenizer, text)

    async def count(self, prompt: str | Sequence[int]) -> int:
        """How many tokens a text has; a long one is counted beside the requests of others."""
        if not isinstance(prompt, str):
            return len(prompt)
        return len(await asyncio.to_thread(_token_ids, self._as_text, prompt))

    def room_before(self, max_tokens: int) -> int:
        """Tokens that the model reads before so many new ones, of which it does not read the last."""
        return max(1, self._sequence_length + 1 - max(1, max_tokens))

    def room_behind(self, tokens: int) -> int:
        """New tokens that may follow so many."""
        return max(1, min(self.max_new_tokens, self._sequence_length + 1 - tokens))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def spelling(self, token: int) -> str:
        """Text of one token."""
        return self.decode([token])


def _token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text; other threads run meanwhile, which `encode` does not let them."""
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids
