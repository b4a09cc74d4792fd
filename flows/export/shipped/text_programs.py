# mypy: disable-error-code="import-not-found, import-untyped"
"""Runs the next tokens of several texts at once: with keys and values kept in pages, or every text from its beginning.

Shape letters: B rows, S new tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .onnx_session import open_session
from .pages import PagePool

Scores = npt.NDArray[np.float32]
DTYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
"""Of keys and values, and the steps of coded ones, by what onnxruntime calls them; E4M3 codes are bytes to numpy."""


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
        inputs = [one for one in self.session.get_inputs() if "_pages_" in one.name]
        self.outputs = [one.name for one in self.session.get_outputs()]  # scores, then what is kept of new tokens
        page_bytes = sum(math.prod(one.shape[1:]) * np.dtype(DTYPES[one.type]).itemsize for one in inputs)
        page_tokens: int = inputs[0].shape[1]
        num_pages = max(1, cache_bytes // page_bytes)
        self.pool = PagePool(num_pages, page_tokens)
        layers = len(inputs) // len(self.outputs[1:])
        # of each kind of what is kept, all layers; memory is taken when a page is first written
        self.pages = [np.zeros((layers, num_pages, *one.shape[1:]), DTYPES[one.type]) for one in inputs[::layers]]
        pools = [pool for kind in self.pages for pool in kind]
        self.page_inputs = dict(zip([one.name for one in inputs], pools, strict=True))
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
            **self.page_inputs,
        }
        scores, *kept = self.session.run(self.outputs, inputs)
        rows = np.repeat(np.arange(len(texts)), new)
        steps = np.concatenate([np.arange(count) for count in counts])
        places = past[rows] + steps
        page = np.array(
            [texts[row].pages[place] for row, place in zip(rows, places // self.pool.page_tokens, strict=True)]
        )
        for pool, of_new_tokens in zip(self.pages, kept, strict=True):
            pool[:, page, places % self.pool.page_tokens] = of_new_tokens[:, rows, steps]
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
