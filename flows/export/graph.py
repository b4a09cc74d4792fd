"""A module as an ONNX graph that any onnxruntime runs, the inference server's too.

Its operations are standard ones and, for 4-bit weights alone, two of the domain `com.microsoft` that every build of
onnxruntime has.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import Tensor, nn

from flows.export import fused_operations, low_bit_operations
from kernels.reference import FP8

OPSET = 18
"""Old enough for every inference server since 2023."""
FP8_OPSET = 19
"""The first with 8-bit floats."""


def export_graph(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
    path: Path,
) -> None:
    """Writes the module's graph; equal weights give equal bytes.

    Args:
        module: What is exported.
        inputs: An example; sizes of 0 or 1 would be taken for constants.
        input_names: One for each input.
        output_names: One for each output.
        dynamic_shapes: For each input, which dimensions may have any size.
        path: ONNX file.
    """
    with_fp8 = any(tensor.dtype == FP8 for tensor in module.buffers())
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            inputs,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=fused_operations.TRANSLATIONS | low_bit_operations.TRANSLATIONS,
            opset_version=FP8_OPSET if with_fp8 else OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    low_bit_operations.lay_out_weights(program.model)
    fused_operations.divide_by_roots(program.model)
    _strip(program.model)
    program.save(path)
    onnx.checker.check_model(path)


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
