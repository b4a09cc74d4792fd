# mypy: disable-error-code="import-not-found, import-untyped"
"""Runs the next tokens of several texts at once: with keys and values kept in pages, or every text from its beginning.

Shape letters: B rows, S new tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .onnx_session import open_session
from .pages import PagePool

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
        path: Program made by `flows.export.generation`.
        threads: Threads of one run; 0 = the runtime's choice.
        cache_bytes: Memory of all keys and values.
    """

    def __init__(self, path: Path, threads: int, cache_bytes: int) -> None:
        self.session = open_session(path, threads)
        names = [one.name for one in self.session.get_inputs()]
        self.page_inputs = [name for name in names if "_pages_" in name]
        page_tokens, heads, width = self.session.get_inputs()[-1].shape[1:]
        page_bytes = 4 * len(self.page_inputs) * page_tokens * heads * width
        num_pages = max(1, cache_bytes // page_bytes)
        self.pool = PagePool(num_pages, page_tokens)
        # all layers' keys, then all layers' values; memory is taken when a page is first written
        self.pages = np.zeros((len(self.page_inputs), num_pages, page_tokens, heads, width), np.float32)
        self.vocab_size: int = self.session.get_outputs()[0].shape[1]

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
        inputs: dict[str, Any] = {
            "input_ids": ids_BS,
            "new_lengths": new,
            "past_lengths": past,
            "page_table": table,
            **dict(zip(self.page_inputs, self.pages, strict=True)),
        }
        scores, keys, values = self.session.run(["logits", "new_keys", "new_values"], inputs)
        rows = np.repeat(np.arange(len(texts)), new)
        steps = np.concatenate([np.arange(count) for count in counts])
        places = past[rows] + steps
        page = np.array(
            [texts[row].pages[place] for row, place in zip(rows, places // self.pool.page_tokens, strict=True)]
        )
        layers = len(self.page_inputs) // 2
        self.pages[:layers, page, places % self.pool.page_tokens] = keys[:, rows, steps]
        self.pages[layers:, page, places % self.pool.page_tokens] = values[:, rows, steps]
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
