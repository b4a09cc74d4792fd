"""Generates many texts at once: texts join and leave between two steps (continuous batching, Orca, OSDI 2022).

A step computes a part of the prompts that wait, then one token of every text that runs. Texts start in the order in
which they came; one starts when there is room for all that it may need, so that none is ever put back. A text that is
only read, for its log-probabilities or its embedding, is a prompt like others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .given_text import Likelihoods, Pool
from .sampling import Sampling, choose_token, cut_at_stop, settled
from .text_programs import Computed, Program

CANCELLED_LOOK_S = 0.05
"""How often texts are asked whether they are cancelled: each one asks the server, which takes as long as half a step
of a small model."""


@dataclass(eq=False)
class Text:
    """One text that is being read, and continued."""

    ids: list[int]
    """Prompt and new tokens."""
    prompt_tokens: int
    max_tokens: int
    sampling: Sampling
    random: np.random.Generator
    stops: Sequence[str] = ()
    likelihoods: Likelihoods | None = None
    """Takes those of new tokens; None = nobody wants them."""
    prompt_likelihoods: Likelihoods | None = None
    """Takes those of the prompt's tokens after the first, for which there is nothing to go by."""
    pool: Pool | None = None
    """Makes an embedding of the prompt."""
    deadline: float | None = None
    """Of `time.monotonic`; what is finished by then is answered, nothing else."""
    is_cancelled: Callable[[], bool] = lambda: False
    asked_prompt_tokens: int = 0
    """Of the prompt as it was given; `prompt_tokens` are those that were kept."""
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    new_ids: list[int] = field(default_factory=list)
    text: str = ""
    """What has been generated, and will stay."""
    finish_reason: str = ""
    """`stop`: end of text or a stop string; `length`: as many tokens as asked for; `cancelled`; `deadline`."""

    @property
    def most_tokens(self) -> int:
        """Tokens whose keys and values are kept at most: the last new one's never are."""
        return self.prompt_tokens + max(0, self.max_tokens - 1)

    @property
    def scores_prompt(self) -> bool:
        """Whether scores are wanted after every token of the prompt."""
        return self.prompt_likelihoods is not None

    @property
    def reads_states(self) -> bool:
        """Whether hidden states of the prompt are wanted."""
        return self.pool is not None


class Generator:
    """All texts of one instance of a model; used by one thread.

    Args:
        program: What computes scores.
        decode: Tokens to text.
        end_of_text: Token that ends a text.
        max_running: Texts that run at the same time.
        prefill_tokens: Prompt tokens computed in one step, so that running texts are never held up for long.
    """

    def __init__(
        self,
        program: Program,
        decode: Callable[[list[int]], str],
        end_of_text: int,
        max_running: int,
        prefill_tokens: int,
    ) -> None:
        self._program, self._decode, self._end_of_text = program, decode, end_of_text
        self._max_running, self._prefill_tokens = max_running, prefill_tokens
        self._waiting: deque[Text] = deque()
        self._running: list[Text] = []
        self._next_look = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running)

    @property
    def running(self) -> int:
        """Texts that are being generated."""
        return len(self._running)

    @property
    def cache_used_ratio(self) -> float:
        """Share of the memory for keys and values that running texts have reserved."""
        return self._program.used_ratio

    @property
    def waiting(self) -> int:
        """Texts that have not started."""
        return len(self._waiting)

    def add(self, text: Text) -> None:
        """Puts a text in line."""
        self._waiting.append(text)

    def step(self) -> list[Text]:
        """Takes every text as far as one step goes; those that have grown or finished."""
        dropped = self._drop()
        self._leave(dropped)
        self._start()
        grown = self._compute(self._decodes()) + self._compute(self._prompts())
        self._leave([text for text in grown if text.finish_reason])
        return dropped + grown

    def stop(self) -> None:
        """Forgets all texts."""
        self._leave(list(self._running))
        self._waiting.clear()

    def _drop(self) -> list[Text]:
        """Texts that nobody waits for any more."""
        now = time.monotonic()
        looks = now >= self._next_look
        if looks:
            self._next_look = now + CANCELLED_LOOK_S
        dropped = []
        for text in (*self._waiting, *self._running):
            if looks and text.is_cancelled():
                text.finish_reason = "cancelled"
            elif text.deadline is not None and now > text.deadline:
                text.finish_reason = "deadline"
            else:
                continue
            dropped.append(text)
        self._waiting = deque(text for text in self._waiting if not text.finish_reason)
        return dropped

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._max_running and self._program.open(self._waiting[0]):
            self._running.append(self._waiting.popleft())

    def _prompts(self) -> list[tuple[Text, int]]:
        """Texts whose prompt is not computed, and how much of it this step computes, first come first served."""
        budget, chosen = self._prefill_tokens, []
        for text in self._running:
            left = text.prompt_tokens - text.computed
            if left > 0 and budget > 0:
                chosen.append((text, min(left, budget)))
                budget -= chosen[-1][1]
        return chosen

    def _decodes(self) -> list[tuple[Text, int]]:
        return [(text, 1) for text in self._running if text.computed >= text.prompt_tokens]

    def _compute(self, parts: list[tuple[Text, int]]) -> list[Text]:
        """Runs parts of texts; the texts whose next token that gave, or whose prompt is read and which want no more."""
        if not parts:
            return []
        texts, counts = zip(*parts, strict=True)
        grown = []
        for text, count, computed in zip(texts, counts, self._program.run(texts, counts), strict=True):
            if text.computed <= text.prompt_tokens:
                _read(text, text.computed - count, computed)
            if text.computed < len(text.ids):
                continue
            if text.max_tokens:
                self._append(text, computed.logits[-1])
            else:
                text.finish_reason = "length"
            grown.append(text)
        return grown

    def _append(self, text: Text, logits_V: Any) -> None:
        """Adds the next token and sees whether the text has finished."""
        token = choose_token(logits_V, text.sampling, text.ids, text.random)
        text.ids.append(token)
        text.new_ids.append(token)
        if text.likelihoods is not None:
            text.likelihoods.add(logits_V, token)
        if token == self._end_of_text:
            text.text, text.finish_reason = self._decode(text.new_ids[:-1]), "stop"
            return
        grown = self._decode(text.new_ids)
        before_stop = cut_at_stop(grown, text.stops)
        if before_stop is not None:
            text.text, text.finish_reason = before_stop, "stop"
        elif len(text.new_ids) == text.max_tokens:
            text.text, text.finish_reason = grown, "length"
        else:
            text.text = grown[: settled(grown, text.stops)]

    def _leave(self, texts: Sequence[Text]) -> None:
        for text in texts:
            if text in self._running:
                self._running.remove(text)
                self._program.close(text)


def _read(text: Text, first: int, computed: Computed) -> None:
    """Notes what a part of a prompt, from token `first` on, says of it."""
    if text.prompt_likelihoods is not None:
        followers = text.ids[first + 1 : text.prompt_tokens]  # one fewer than scores where the prompt ends
        for logits_V, token in zip(computed.logits, followers, strict=False):
            text.prompt_likelihoods.add(logits_V, token)
    if text.pool is not None and computed.states is not None:
        text.pool.add(computed.states)
