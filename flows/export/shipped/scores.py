# mypy: disable-error-code="import-not-found, import-untyped"
"""Token ids to scores of the next token: runs model.onnx on the embedded server, which has no ONNX backend of its own.

Shape letters: B rows, L length, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils  # provided by the server

from .digests import check_files, state_files
from .pipeline import Pipeline, RankEndedError, open_program

Ids = npt.NDArray[np.int64]


class RefusedError(ValueError):
    """A request that cannot be answered; its neighbours in the batch can."""


class TritonPythonModel:
    """One instance of the scores model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Checks the version's files and makes a session."""
        here = Path(__file__).parent
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self.stated = state_files(pb_utils, labels, check_files(here))
        settings = json.loads((here / "settings.json").read_text())
        self.sequence_length: int = settings["sequence_length"]
        self.program = open_program(here / "model.onnx", settings)
        self.vocab_size = self.program.width

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers a batch of requests with one run of the program."""
        responses: dict[int, Any] = {}
        accepted: dict[int, tuple[Ids, Ids]] = {}
        for number, request in enumerate(requests):
            try:
                accepted[number] = self.read(request)
            except RefusedError as error:
                responses[number] = pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                )
        if accepted:
            ids_BL, mask_BL = merge(list(accepted.values()))
            try:
                logits_BV = self.program.run({"input_ids": ids_BL, "attention_mask": mask_BL})["logits"]
            except RankEndedError as error:
                failed = pb_utils.TritonError(f"{error}.", pb_utils.TritonError.UNAVAILABLE)
                responses |= {number: pb_utils.InferenceResponse(error=failed) for number in accepted}
                accepted = {}
            first = 0
            for number, (ids, _) in accepted.items():
                rows = logits_BV[first : first + len(ids)]
                first += len(ids)
                responses[number] = pb_utils.InferenceResponse([pb_utils.Tensor("logits", rows)])
        return [responses[number] for number in range(len(requests))]

    def finalize(self) -> None:
        """Ends the ranks of a split program."""
        if isinstance(self.program, Pipeline):
            self.program.close()

    def read(self, request: Any) -> tuple[Ids, Ids]:
        """Ids and mask [B, L] of a request, or `RefusedError`."""
        ids_BL: Ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
        mask_BL: Ids = pb_utils.get_input_tensor_by_name(request, "attention_mask").as_numpy()
        length = ids_BL.shape[1]
        if mask_BL.shape != ids_BL.shape:
            raise RefusedError(f"attention_mask has shape {mask_BL.shape}, not {ids_BL.shape} like input_ids")
        if not 1 <= length <= self.sequence_length:
            raise RefusedError(f"input_ids has {length} tokens a row: it must have 1 to {self.sequence_length}")
        if ids_BL.min() < 0 or ids_BL.max() >= self.vocab_size:
            wrong = ids_BL[(ids_BL < 0) | (ids_BL >= self.vocab_size)][0]
            raise RefusedError(f"input_ids contains {wrong}: ids must lie between 0 and {self.vocab_size - 1}")
        blocks_B = (np.diff(mask_BL, prepend=0, axis=1) == 1).sum(axis=1)
        if not np.isin(mask_BL, (0, 1)).all() or (blocks_B != 1).any():
            raise RefusedError("attention_mask must be one block of ones in every row, with zeros before or after it")
        return ids_BL, mask_BL


def merge(requests: list[tuple[Ids, Ids]]) -> tuple[Ids, Ids]:
    """Ids and mask [B, L] of all rows of all requests, padded on the right to the longest."""
    rows, longest = sum(len(ids) for ids, _ in requests), max(ids.shape[1] for ids, _ in requests)
    ids_BL, mask_BL = np.zeros((rows, longest), np.int64), np.zeros((rows, longest), np.int64)
    first = 0
    for ids, mask in requests:
        block = np.s_[first : first + len(ids), : ids.shape[1]]
        ids_BL[block], mask_BL[block] = ids, mask
        first += len(ids)
    return ids_BL, mask_BL
