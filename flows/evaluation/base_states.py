"""What the base model makes of the test split, kept once for all candidates that are compared with it.

Kept are its hidden states before the output projection, in float32 as they are, of the tokens that are predicted: D
numbers for each in place of V scores. Scores are made of them anew by the base model's own projection, a small part of
its work.

Shape letters: B batch, L length, N predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from flows.model.decoder import Decoder
from flows.model.transformers_model import TransformersModel

STATES = "states.bin"


class StatesFile:
    """Where the base model's hidden states are kept while it is measured; a context manager.

    Args:
        directory: Quality artifact of the base model, in the making.
    """

    def __init__(self, directory: Path) -> None:
        self._file = (directory / STATES).open("wb")

    def __enter__(self) -> StatesFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def run(
        self, model: Decoder | TransformersModel, ids_BL: Tensor, masks: Mapping[str, Tensor], places_N: Tensor
    ) -> Tensor:
        """Scores [B, L, V] of the base model, whose states at the predicted places are kept.

        Args:
            model: The base model.
            ids_BL: Token ids.
            masks: What the model is told besides.
            places_N: Which of the B x L tokens are predicted, in the order of batches.
        """
        states_BLD = model.forward_hidden(ids_BL, **masks)
        self._file.write(states_BLD.flatten(0, 1)[places_N].float().cpu().numpy().tobytes())
        scores_BLV: Tensor = model.lm_head(states_BLD)
        return scores_BLV


class BaseScores:
    """Scores of the base model for the tokens that it was measured on.

    Args:
        quality_dir: Quality artifact of the base model.
        head: The base model's output projection, on the device where scores are wanted.
        tokens: How many tokens were predicted.
    """

    def __init__(self, quality_dir: Path, head: nn.Module, tokens: int) -> None:
        self._states_ND = np.memmap(quality_dir / STATES, np.float32, "r").reshape(tokens, -1)
        self._head = head
        self._device = next(head.parameters()).device

    def of(self, first: int, count: int) -> Tensor:
        """Scores [count, V] of predicted tokens in the order in which they were measured, the first of them `first`."""
        states = torch.from_numpy(np.array(self._states_ND[first : first + count]))
        scores: Tensor = self._head(states.to(self._device))
        return scores
