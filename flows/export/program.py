"""Stage: a candidate to an ONNX program that computes next-token scores, compared with the candidate before it counts.

Standard operations only, so that it runs in any onnxruntime, the inference server's included.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript import opset18
from torch import Tensor, nn

from flows.artifact import Artifact
from flows.compression.candidate import count_parameters, load_candidate
from flows.compression.int8 import LEVELS, SMALLEST_AMAX
from flows.data.tokenizer import copy_tokenizer
from flows.export.parity import compare
from flows.export.runtime import PROGRAM, Program
from flows.model.decoder import Decoder
from flows.model.transformers_model import TransformersModel

OPSET = 18
"""Old enough for every inference server since 2023."""
_ZERO_POINT = 128
op: Any = opset18  # its types are those of onnxscript's own language


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
    ids = torch.arange(6).view(2, 3)  # sizes of 0 or 1 would be taken for constants
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            scores,
            (ids, torch.ones_like(ids)),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(free, free),
            custom_translation_table={torch.ops.millrace.int8_linear.default: _int8_linear},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _strip(program.model)
    program.save(path)
    onnx.checker.check_model(path)


def _int8_linear(x: Any, weight: Any, weight_scale: Any) -> Any:
    """`millrace::int8_linear` in integer operations.

    Activation codes are shifted to uint8, the only kind for which x86 has a fast kernel: 0.4 x the time of float32,
    where int8 takes 3 x. Both scales are multiplied before they meet the sums, which onnxruntime then fuses.
    """
    steps = op.Max(op.ReduceMax(op.Abs(x), [-1], keepdims=1), op.Constant(value_float=SMALLEST_AMAX))
    scale = op.Div(steps, op.Constant(value_float=float(LEVELS)))
    zero_point = op.Constant(value=onnx.numpy_helper.from_array(np.array(_ZERO_POINT, np.uint8)))
    codes = op.QuantizeLinear(op.Div(x, scale), op.Constant(value_float=1.0), zero_point)
    sums = op.MatMulInteger(codes, op.Transpose(weight, perm=[1, 0]), zero_point)
    return op.Mul(op.Cast(sums, to=onnx.TensorProto.FLOAT), op.Mul(scale, weight_scale))


def _strip(model: onnx_ir.Model) -> None:
    """Drops what the graph does not need to run: source lines of this machine, traces, shapes in between."""
    interface = {*model.graph.inputs, *model.graph.outputs}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in interface:
                value.shape = value.type = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says about itself and about packages that nothing here uses."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
