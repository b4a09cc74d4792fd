# mypy: disable-error-code="import-not-found, import-untyped"
"""Runs the next tokens of several texts at once: with keys and values kept in pages, or every text from its beginning.

Shape letters: B rows, S new tokens of a row, R scored tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .layers import READS_STATES, STATES, Runner
from .onnx_session import open_session
from .pages import PagePool
from .pipeline import RankEndedError

Floats = npt.NDArray[np.float32]


class Text(Protocol):
    """What a program has to know of a text; it may keep pages with it."""

    ids: list[int]
    """Prompt and new tokens."""
    computed: int
    """How many of them have been computed."""
    pages: list[int]

    @property
    def prompt_tokens(self) -> int:
        """How many of them are the prompt."""

    @property
    def most_tokens(self) -> int:
        """How many will be computed at most."""

    @property
    def scores_prompt(self) -> bool:
        """Whether scores are wanted after every token of the prompt; else after the last one that is computed."""

    @property
    def reads_states(self) -> bool:
        """Whether hidden states of the prompt are wanted."""


@dataclass(frozen=True)
class Computed:
    """What came of some tokens of one text."""

    logits: Floats
    """Scores of what follows each of them, or the last alone [tokens or 1, V]."""
    states: Floats | None = None
    """Their hidden states [tokens, D], where the text wants them."""


class Program(Protocol):
    """What runs texts."""

    @property
    def used_ratio(self) -> float:
        """Share of its memory for texts that is taken."""

    def open(self, text: Text) -> bool:
        """Makes room for a text and sets what of it need not be computed; False if there is no room now."""

    def run(self, texts: Sequence[Text], counts: Sequence[int]) -> list[Computed]:
        """Computes the next so many tokens of each text."""

    def close(self, text: Text) -> None:
        """Forgets a text."""


class PagedProgram:
    """Computes new tokens only.

    Args:
        layers: Program made by `flows.export.generation`, whole or split.
    """

    def __init__(self, layers: Runner) -> None:
        self.layers = layers
        self.pool = PagePool(layers.num_pages, layers.page_tokens)
        self.vocab_size = layers.width

    @property
    def used_ratio(self) -> float:
        """See `Program.used_ratio`."""
        return self.pool.used / self.pool.num_pages

    def open(self, text: Text) -> bool:
        """See `Program.open`."""
        whole = text.scores_prompt or text.reads_states  # pages that are there already tell nothing of their tokens
        reserved = self.pool.reserve([] if whole else text.ids, text.most_tokens)
        if reserved is None:
            return False
        text.pages, text.computed = reserved
        return True

    def run(self, texts: Sequence[Text], counts: Sequence[int]) -> list[Computed]:
        """See `Program.run`."""
        past = np.array([text.computed for text in texts])
        new = np.array(counts)
        ids_BS = np.zeros((len(texts), max(counts)), np.int64)
        table = np.zeros((len(texts), -(-int(past.max()) // self.pool.page_tokens)), np.int64)
        for row, text in enumerate(texts):
            ids_BS[row, : counts[row]] = text.ids[text.computed : text.computed + counts[row]]
            pages = text.pages[: table.shape[1]]
            table[row, : len(pages)] = pages
        new_pages = np.zeros_like(ids_BS)
        for row, text in enumerate(texts):
            places = np.arange(text.computed, text.computed + counts[row])
            new_pages[row, : counts[row]] = np.array(text.pages)[places // self.pool.page_tokens]
        num_scored = [count if scores_all(text) else 1 for text, count in zip(texts, counts, strict=True)]
        given = {
            "input_ids": ids_BS,
            "new_lengths": new,
            "num_scored": np.array(num_scored),
            "past_lengths": past,
            "page_table": table,
            "new_pages": new_pages,
        }
        reads = np.array([reads_states(text) for text in texts])
        if reads.any():
            given[READS_STATES] = reads
        try:
            made = self.layers.run(given)
        except RankEndedError:
            self.pool.forget()
            raise
        logits = np.split(made["logits"], np.cumsum(num_scored)[:-1])
        computed = [
            Computed(logits[row], made[STATES][row, : counts[row]] if reads[row] else None) for row in range(len(texts))
        ]
        for text, count in zip(texts, counts, strict=True):
            before = text.computed
            text.computed += count
            if before < text.prompt_tokens <= text.computed:
                self.pool.remember(text.ids[: text.prompt_tokens], text.pages)
        return computed

    def close(self, text: Text) -> None:
        """See `Program.close`."""
        self.pool.release(text.pages)
        text.pages = []


def scores_all(text: Text) -> bool:
    """Whether scores are wanted after each of the tokens that are computed next."""
    return text.scores_prompt and text.computed < text.prompt_tokens


def reads_states(text: Text) -> bool:
    """Whether hidden states of the tokens that are computed next are wanted."""
    return text.reads_states and text.computed < text.prompt_tokens


class WholeProgram:
    """Computes every text from its beginning, each time: for models whose keys and values are not to be had.

    It gives scores after the last token alone, and no hidden states.

    Args:
        path: Program made by `flows.export.program`.
        threads: Threads of one run; 0 = the runtime's choice.
    """

    used_ratio = 0.0

    def __init__(self, path: Path, threads: int) -> None:
        self.session = open_session(path, threads)
        self.vocab_size: int = self.session.get_outputs()[0].shape[1]

    def open(self, text: Text) -> bool:
        """See `Program.open`."""
        text.computed = 0
        return True

    def run(self, texts: Sequence[Text], counts: Sequence[int]) -> list[Computed]:
        """See `Program.run`."""
        for text, count in zip(texts, counts, strict=True):
            text.computed += count
        ids_BS = np.zeros((len(texts), max(text.computed for text in texts)), np.int64)
        mask_BS = np.zeros_like(ids_BS)
        for row, text in enumerate(texts):
            ids_BS[row, : text.computed] = text.ids[: text.computed]
            mask_BS[row, : text.computed] = 1
        (scores_BV,) = self.session.run(["logits"], {"input_ids": ids_BS, "attention_mask": mask_BS})
        return [Computed(scores_V[None]) for scores_V in scores_BV]

    def close(self, text: Text) -> None:
        """See `Program.close`."""
