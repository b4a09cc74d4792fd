# Calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""Stage `split`: a candidate's program in parts, one for each rank that serves it, compared with the candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flows.artifact import Artifact
from flows.compression.candidate import count_parameters, load_candidate
from flows.config.serving import SplitConfig
from flows.data.tokenizer import copy_tokenizer
from flows.export.graph import export_graph
from flows.export.parity import compare
from flows.export.parts import DecoderPart, PartsInTurn, share_layers
from flows.export.program import scores_of
from flows.export.runtime import PROGRAM
from flows.export.shipped.pipeline import part_path
from flows.model.attention import angles, last_places, positions, visible_keys
from flows.model.decoder import Decoder


class PartOfScores(nn.Module):
    """One part of `flows.export.program.NextTokenScores`."""

    def __init__(self, part: DecoderPart) -> None:
        super().__init__()
        self.part = part

    def forward(self, given: Tensor, attention_mask: Tensor) -> Tensor:
        """Residual stream [batch, length, hidden size], or scores [batch, vocab].

        Args:
            given: Ids [batch, length], int64, or the residual stream.
            attention_mask: Mask [batch, length], int64; padding on either side.
        """
        part = self.part
        x_BLD = part.enter(given)
        rotation = angles(positions(attention_mask, attention_mask, None), part.head_dim, part.rope_theta)
        visible = visible_keys(x_BLD, part.head_dim, part.kernels, attention_mask)
        for layer in part.layers:
            x_BLD = layer(x_BLD, rotation, visible)
        return part.leave(x_BLD, last_places(attention_mask))


def build(directory: Path, config: SplitConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes model-0.onnx, model-1.onnx, ... and tokenizer.json.

    Args:
        directory: Where the files go.
        config: How many parts.
        parents: `model`: a candidate that is a decoder of ours.

    Returns:
        `program_bytes`, `part_bytes` (of each), `layers` (of each), `parameters` and, from the comparison with the
        candidate, `largest_difference` and `tolerance`.

    Raises:
        ProgramError: The parts together do not compute what the candidate computes.
    """
    source = parents["model"].path
    model = load_candidate(source)
    assert isinstance(model, Decoder), "others are not split"
    scores = scores_of(model, source).eval()
    shares = share_layers(model, config.pipeline_stages)
    for number, (first, behind) in enumerate(shares):
        _export_part(DecoderPart(model, first, behind, number), part_path(directory / PROGRAM, number))
    copy_tokenizer(source, directory)
    parity = compare(scores, _Scoring(PartsInTurn(directory / PROGRAM, len(shares))), model.vocab_size)
    sizes = [part_path(directory / PROGRAM, number).stat().st_size for number in range(len(shares))]
    return {
        "program_bytes": sum(sizes),
        "part_bytes": sizes,
        "layers": [behind - first for first, behind in shares],
        "parameters": count_parameters(model),
        "largest_difference": parity.largest_difference,
        "tolerance": parity.tolerance,
    }


def _export_part(part: DecoderPart, path: Path) -> None:
    ids = torch.arange(6).view(2, 3)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    names = [part.given, "attention_mask"]
    example = (part.example(ids), torch.ones_like(ids))
    export_graph(PartOfScores(part).eval(), example, names, [part.made], (free, free), path)


@dataclass(frozen=True)
class _Scoring:
    parts: PartsInTurn

    def next_token_scores(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores [batch, vocab] of the token after each row's last real one."""
        return np.asarray(self.parts.run({"input_ids": input_ids, "attention_mask": attention_mask})["logits"])
