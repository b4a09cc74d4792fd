"""Memory and processor seconds of programs whose needs are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from flows.evaluation.footprint import Load, measure_footprint
from flows.export.runtime import ProgramError

LOAD = Load(batch_size=4, tokens=16, requests=5)


def program(directory: Path, width: int, multiplications: int) -> Path:
    """A program that holds a matrix of width x width float32 numbers and multiplies with it."""
    directory.mkdir()
    ids, mask = (
        helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "l"]) for n in ("input_ids", "attention_mask")
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", width])
    matrix = numpy_helper.from_array(np.full((width, width), 1e-4, np.float32), "matrix")
    axis, tall = numpy_helper.from_array(np.array([1]), "axis"), numpy_helper.from_array(np.array([1, width]), "tall")
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["real"]),
        helper.make_node("Cast", ["real"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["values", "axis"], ["sum"], keepdims=1),
        helper.make_node("Tile", ["sum", "tall"], ["x0"]),
        *(helper.make_node("MatMul", [f"x{n}", "matrix"], [f"x{n + 1}"]) for n in range(multiplications)),
        helper.make_node("Identity", [f"x{multiplications}"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "program", [ids, mask], [logits], [matrix, axis, tall])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, directory / "model.onnx")
    return directory


def test_a_matrix_is_seen_in_memory_and_work_in_processor_time(tmp_path: Path) -> None:
    small = measure_footprint(program(tmp_path / "small", 64, 1), LOAD)
    large = measure_footprint(program(tmp_path / "large", 2048, 2), LOAD)
    held = 4 * 2048**2
    # beside the matrix the runtime may keep the file that it read, and a packed copy for each of two multiplications
    assert held <= large.resident_bytes - small.resident_bytes <= 4 * held
    assert large.cpu_s_per_1000_tokens > 10 * small.cpu_s_per_1000_tokens > 0


def test_a_program_that_does_not_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"could not be measured in a process of its own: .*cannot be loaded"):
        measure_footprint(tmp_path, LOAD)
