"""Stage: a candidate to an ONNX program of next-token scores, compared with the candidate before it counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flows.artifact import Artifact
from flows.compression.candidate import count_parameters, load_candidate
from flows.data.tokenizer import copy_tokenizer
from flows.export.graph import OPSET, export_graph
from flows.export.parity import compare
from flows.export.runtime import PROGRAM, Program
from flows.model.decoder import Decoder
from flows.model.transformers_model import TransformersModel


class NextTokenScores(nn.Module):
    """Scores of the token after each row's last real one; only that position meets the output projection."""

    def __init__(self, model: Decoder | TransformersModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [batch, vocab] for ids and mask [batch, length], int64; padding on either side."""
        hidden = self.model.forward_hidden(input_ids, attention_mask)
        order = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        last = (attention_mask * order).argmax(1)
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        scores: Tensor = self.model.lm_head(hidden[rows, last])
        return scores


def build(directory: Path, config: None, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes model.onnx and tokenizer.json.

    Args:
        directory: Where the files go.
        config: There is nothing to choose.
        parents: `model`: any candidate.

    Returns:
        `program_bytes`, `parameters`, `opset`, `export_seconds` and, from the comparison with the candidate,
        `largest_difference` and `tolerance`.

    Raises:
        ProgramError: The program does not compute what the candidate computes.
    """
    source = parents["model"].path
    scores = NextTokenScores(load_candidate(source)).eval()
    started = time.perf_counter()
    export_program(scores, directory / PROGRAM)
    seconds = time.perf_counter() - started
    copy_tokenizer(source, directory)
    parity = compare(scores, Program(directory), scores.model.vocab_size)
    return {
        "program_bytes": sum(path.stat().st_size for path in directory.glob(f"{PROGRAM}*")),
        "parameters": count_parameters(scores.model),
        "opset": OPSET,
        "export_seconds": round(seconds, 2),
        "largest_difference": parity.largest_difference,
        "tolerance": parity.tolerance,
    }


def export_program(scores: NextTokenScores, path: Path) -> None:
    """Writes the graph, for any batch size and length; equal weights give equal bytes."""
    ids = torch.arange(6).view(2, 3)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    inputs, outputs = ["input_ids", "attention_mask"], ["logits"]
    export_graph(scores, (ids, torch.ones_like(ids)), inputs, outputs, (free, free), path)
