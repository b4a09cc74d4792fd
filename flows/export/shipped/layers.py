# mypy: disable-error-code="import-not-found, import-untyped"
"""Runs a program, or the part of it that one rank has, and keeps the keys and values of its layers.

Shape letters: B rows, S new tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .onnx_session import open_session

Arrays = Mapping[str, Any]
"""Arrays by name, each with a first dimension of B rows."""
DTYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
"""Of keys and values, and the steps of coded ones, by what onnxruntime calls them; E4M3 codes are bytes to numpy."""
SCORED = "scored"
STATES = "hidden_states"
"""Of new tokens after the final norm, which few texts want."""
READS_STATES = "reads_states"


class Runner(Protocol):
    """What runs a program, wherever its parts are."""

    width: int
    """Of what is asked for: of scores the vocabulary's size."""
    num_pages: int
    """That hold keys and values of all texts; 0 for a program that keeps none."""
    page_tokens: int

    def run(self, given: Arrays) -> Arrays:
        """See `Layers.run`."""


class Layers:
    """A session of a program; where that reads pages, the pages of its layers, too.

    Args:
        path: Program made by `flows.export`, or a part of one.
        threads: Threads of one run; 0 = the runtime's choice.
        cache_bytes: Memory of the keys and values of all layers of the model.
        num_layers: How many that are; 0 = those of this program.
    """

    def __init__(self, path: Path, threads: int, cache_bytes: int = 0, num_layers: int = 0) -> None:
        self.session = open_session(path, threads)
        inputs = self.session.get_inputs()
        pages = [one for one in inputs if "_pages_" in one.name]
        self.inputs = [one.name for one in inputs if one not in pages]
        outputs = [one.name for one in self.session.get_outputs()]
        self.outputs = [name for name in outputs if name != STATES]  # what is asked for, then what is kept
        self.has_states = STATES in outputs
        self.width: int = self.session.get_outputs()[0].shape[-1]
        kinds = max(1, len(self.outputs) - 1)
        own = len(pages) // kinds
        first = pages[::own] if own else []
        self.page_tokens: int = first[0].shape[1] if first else 1
        token_bytes = sum(int(np.prod(one.shape[2:])) * np.dtype(DTYPES[one.type]).itemsize for one in first)
        page_bytes = self.page_tokens * token_bytes * (num_layers or own)
        self.num_pages = max(1, cache_bytes // page_bytes) if first else 0
        # of each kind of what is kept, all layers; memory is taken when a page is first written
        self.pages = [np.zeros((own, self.num_pages, *one.shape[1:]), DTYPES[one.type]) for one in first]
        pools = [pool for kind in self.pages for pool in kind]
        self.page_inputs = dict(zip([one.name for one in pages], pools, strict=True))

    def run(self, given: Arrays) -> Arrays:
        """What the program makes of it, and what the next rank needs besides; new keys and values go to their pages.

        Args:
            given: The program's inputs by name. For one with pages also `new_lengths` [B], how many new tokens are
                real; `new_pages` [B, S], the page of each; and instead of `scored` `num_scored` [B], how many of the
                last ones are. With `reads_states` [B] it makes hidden states, too.
        """
        inputs = {name: given[name] for name in self.inputs if name != SCORED}
        if SCORED in self.inputs:
            inputs[SCORED] = _scored(given, given[self.inputs[0]].shape[1])
        states = [STATES] if self.has_states and READS_STATES in given else []
        made, *kept = self.session.run([*self.outputs, *states], {**inputs, **self.page_inputs})
        found = {self.outputs[0]: np.asarray(made)}
        if states:
            found[STATES] = kept.pop()
        if kept:
            new = given["new_lengths"]
            rows, steps = np.nonzero(np.arange(int(new.max())) < new[:, None])
            places = given["past_lengths"][rows] + steps
            for pool, of_new_tokens in zip(self.pages, kept, strict=True):
                pool[:, given["new_pages"][rows, steps], places % self.page_tokens] = of_new_tokens[:, rows, steps]
        rest = {name: array for name, array in given.items() if name != self.inputs[0]}
        return {**rest, **found}


def _scored(given: Arrays, length: int) -> Any:
    """Which new tokens meet the output projection [R]: row x length + place in the row."""
    ends = np.arange(len(given["new_lengths"])) * length + given["new_lengths"]
    return np.concatenate([np.arange(end - n, end) for end, n in zip(ends, given["num_scored"], strict=True)])
