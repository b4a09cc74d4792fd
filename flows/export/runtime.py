"""Runs a program in this process, on the same runtime that the inference server uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flows.config import RunError
from flows.export.shipped.onnx_session import open_session

PROGRAM = "model.onnx"


class ProgramError(RunError):
    """A program cannot be run, or does not compute what it should."""


class Program:
    """An exported candidate on onnxruntime's CPU provider.

    Args:
        directory: Program artifact.
        threads: Threads of one request; 0 = the runtime's choice.

    Raises:
        ProgramError: There is no program, or the runtime refuses it.
    """

    def __init__(self, directory: Path, threads: int = 0) -> None:
        try:
            self._session = open_session(directory / PROGRAM, threads)
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise ProgramError(f"{directory / PROGRAM} cannot be loaded: {error}. Export the model again.") from error

    def next_token_scores(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores [batch, vocab] of the token after each row's last real one.

        Args:
            input_ids: Token ids [batch, length].
            attention_mask: 1 for real tokens, 0 for padding on either side [batch, length].
        """
        (scores,) = self._session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})
        return np.asarray(scores)
