# mypy: disable-error-code="import-not-found, import-untyped"
"""Runs the next tokens of several texts at once: with keys and values kept in pages, or every text from its beginning.

Shape letters: B rows, S new tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .layers import Runner
from .onnx_session import open_session
from .pages import PagePool
from .pipeline import RankEndedError

Scores = npt.NDArray[np.float32]


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


class Program(Protocol):
    """What runs texts."""

    @property
    def used_ratio(self) -> float:
        """Share of its memory for texts that is taken."""

    def open(self, text: Text) -> bool:
        """Makes room for a text and sets what of it need not be computed; False if there is no room now."""

    def run(self, texts: Sequence[Text], counts: Sequence[int]) -> Scores:
        """Computes the next so many tokens of each text; scores of the token after them [B, V]."""

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
        reserved = self.pool.reserve(text.ids, text.most_tokens)
        if reserved is None:
            return False
        text.pages, text.computed = reserved
        return True

    def run(self, texts: Sequence[Text], counts: Sequence[int]) -> Scores:
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
        given = {
            "input_ids": ids_BS,
            "new_lengths": new,
            "past_lengths": past,
            "page_table": table,
            "new_pages": new_pages,
        }
        try:
            scores = self.layers.run(given)["logits"]
        except RankEndedError:
            self.pool.forget()
            raise
        for text, count in zip(texts, counts, strict=True):
            before = text.computed
            text.computed += count
            if before < text.prompt_tokens <= text.computed:
                self.pool.remember(text.ids[: text.prompt_tokens], text.pages)
        return np.asarray(scores)

    def close(self, text: Text) -> None:
        """See `Program.close`."""
        self.pool.release(text.pages)
        text.pages = []


class WholeProgram:
    """Computes every text from its beginning, each time: for models whose keys and values are not to be had.

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

    def run(self, texts: Sequence[Text], counts: Sequence[int]) -> Scores:
        """See `Program.run`."""
        for text, count in zip(texts, counts, strict=True):
            text.computed += count
        ids_BS = np.zeros((len(texts), max(text.computed for text in texts)), np.int64)
        mask_BS = np.zeros_like(ids_BS)
        for row, text in enumerate(texts):
            ids_BS[row, : text.computed] = text.ids[: text.computed]
            mask_BS[row, : text.computed] = 1
        (scores,) = self.session.run(["logits"], {"input_ids": ids_BS, "attention_mask": mask_BS})
        return np.asarray(scores)

    def close(self, text: Text) -> None:
        """See `Program.close`."""
