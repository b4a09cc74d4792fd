"""Stage: a candidate to an ONNX program of one token's or text's scores, compared with it before it counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flows.artifact import Artifact
from flows.compression.candidate import count_parameters, load_candidate
from flows.config.model import Family
from flows.data.tokenizer import copy_tokenizer, mask_token_id
from flows.export.graph import OPSET, export_graph
from flows.export.parity import compare
from flows.export.runtime import PROGRAM, Program
from flows.model.attention import last_places
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
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        scores: Tensor = self.model.lm_head(hidden[rows, self.place(input_ids, attention_mask)])
        return scores

    def place(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Position in each row whose scores are asked for [batch]: the last real one."""
        return last_places(attention_mask)


class HiddenTokenScores(NextTokenScores):
    """Scores of each row's first mask token; where a row has none, of its last real token.

    Args:
        model: A masked model.
        mask_token_id: Token in the place of a hidden one.
    """

    def __init__(self, model: Decoder | TransformersModel, mask_token_id: int) -> None:
        super().__init__(model)
        self.mask_token_id = mask_token_id

    def place(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Position in each row whose scores are asked for [batch]."""
        hidden = attention_mask * (input_ids == self.mask_token_id)
        return torch.where(hidden.amax(1) > 0, hidden.argmax(1), super().place(input_ids, attention_mask))


class LabelScores(NextTokenScores):
    """Scores [batch, labels] of what each row's text is."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [batch, labels] for ids and mask [batch, length], int64; padding on either side."""
        scores: Tensor = self.model(input_ids, attention_mask)
        return scores.squeeze(1)


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
    scores = scores_of(load_candidate(source), source).eval()
    started = time.perf_counter()
    export_program(scores, directory / PROGRAM)
    seconds = time.perf_counter() - started
    copy_tokenizer(source, directory)
    longest = scores.model.longest if isinstance(scores.model, TransformersModel) else None
    parity = compare(scores, Program(directory), scores.model.vocab_size, longest)
    return {
        "program_bytes": sum(path.stat().st_size for path in directory.glob(f"{PROGRAM}*")),
        "parameters": count_parameters(scores.model),
        "opset": OPSET,
        "export_seconds": round(seconds, 2),
        "largest_difference": parity.largest_difference,
        "tolerance": parity.tolerance,
    }


def scores_of(model: Decoder | TransformersModel, tokenizer_dir: Path) -> NextTokenScores:
    """What a program of the model computes.

    Args:
        model: Any candidate.
        tokenizer_dir: The candidate's directory, or its tokenizer's.
    """
    if model.family == Family.masked_lm:
        return HiddenTokenScores(model, mask_token_id(tokenizer_dir))
    if model.family == Family.sequence_classification:
        return LabelScores(model)
    return NextTokenScores(model)


def export_program(scores: NextTokenScores, path: Path) -> None:
    """Writes the graph, for any batch size and length; equal weights give equal bytes."""
    ids = torch.arange(6).view(2, 3)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    inputs, outputs = ["input_ids", "attention_mask"], ["logits"]
    export_graph(scores, (ids, torch.ones_like(ids)), inputs, outputs, (free, free), path)
