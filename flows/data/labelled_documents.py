# Shape letters are upper case.
"""One text a sequence, with one target: its label.

Shape letters: L tokens of a sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.config.checks import require
from flows.data.order import sample_order
from flows.data.packed import Row, map_shards, read_index


class LabelledDocuments:
    """A split of a tokens artifact of texts with labels; memory-mapped, 24 bytes for each text are held.

    Sequence i is the i-th text, filled up with end-of-text tokens. What fills it up counts as another document: no
    model looks at it.
    """

    def __init__(self, directory: Path, split: str, sequence_length: int) -> None:
        """Opens the shards.

        Args:
            directory: Path of the tokens artifact.
            split: `train`, `validation` or `test`.
            sequence_length: Tokens of a sequence; no text is longer.

        Raises:
            ConfigError: The split is empty.
        """
        index = read_index(directory)
        self._shards = map_shards(directory, split)
        self._labels = read_labels(directory, split)
        self._eos_token_id = index["eos_token_id"]
        self.sequence_length = sequence_length
        parts = []
        for number, shard in enumerate(index["splits"][split]["shards"]):
            starts = np.load(directory / shard["file"].replace(".bin", ".documents.npy"))
            parts.append(np.stack([np.full_like(starts, number), starts, np.append(starts[1:], shard["tokens"])], 1))
        self._texts = np.concatenate(parts) if parts else np.empty((0, 3), np.int64)
        require(
            len(self._texts) > 0,
            f"data.corpus.{split}_fraction" if split != "train" else "data.corpus.paths",
            f"the {split} split",
            "holds no text with a label that is learnt",
            "Give more texts, or a larger share to the split.",
        )

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Tokens of sequence `index`, filled up: int64 [L + 1]."""
        tokens = np.full(self.sequence_length + 1, self._eos_token_id, np.int64)
        text = self._text(index)
        tokens[: len(text)] = text
        return tokens

    def row(self, index: int) -> Row:
        """Sequence `index` as inputs, its label as the one target [1], and which tokens only fill it up (1)."""
        fills = (np.arange(self.sequence_length) >= len(self._text(index))).astype(np.int64)
        return Row(self[index][:-1], self._labels[index : index + 1], fills)

    def order(self, start: int, count: int, seed: int) -> NDArray[np.int64]:
        """Indices at positions `start` to `start + count` of an endless shuffled stream, int64 [count]."""
        return sample_order(len(self), start, count, seed)

    def first(self, count: int) -> NDArray[np.int64]:
        """The indices of at most `count` sequences spread over the split, which may be sorted by label."""
        count = min(count, len(self))
        return np.arange(count) * len(self) // count

    def _text(self, index: int) -> NDArray[Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        shard, first, last = self._texts[index]
        tokens: NDArray[Any] = self._shards[shard][first:last]
        return tokens


def read_labels(directory: Path, split: str) -> NDArray[np.int64]:
    """Number of the label of each text of a split of a tokens artifact, int64 [texts]."""
    shards = read_index(directory)["splits"][split]["shards"]
    parts = [np.load(directory / shard["file"].replace(".bin", ".labels.npy")) for shard in shards]
    return np.concatenate([np.empty(0, np.int64), *parts])
