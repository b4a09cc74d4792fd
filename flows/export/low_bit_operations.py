"""Operations on weights of few bits as ONNX operations that are fast on x86, and their weights as those want them.

Integer products are standard operations. 4-bit weights take two that every onnxruntime build has besides, of the domain
`com.microsoft`: MatMulNBits and GatherBlockQuantized. Weights in INT8 or E4M3 that meet floating point have no fast
operation: they are written out before each product, one matrix at a time, so that file and memory stay small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx.defs import OpSchema
from onnxscript import opset18
from onnxscript.values import Op, Opset

from flows.compression.int8 import fp8_linear, int8_linear
from flows.compression.weight_only import int4_embedding, int4_weight_linear, int8_weight_linear
from kernels.int4_layout import unpack
from kernels.reference import FP8, INT8, LARGEST_CODE, SMALLEST_MAGNITUDE

CONTRIB = "com.microsoft"
_ZERO_POINT = 128
_INT8_COMPUTE, _FLOAT_COMPUTE = 4, 1
"""Of MatMulNBits: activations rounded to INT8, block by block, or left as they are."""
op: Any = opset18  # its types are those of onnxscript's own language


def _int8_linear(x: Any, weight: Any, weight_scale: Any, bias: Any = None, input_scale: Any = None) -> Any:
    """`millrace::int8_linear` in integer operations.

    Activation codes are shifted to uint8, the only kind for which x86 has a fast kernel: 0.4 x the time of float32,
    where int8 takes 3 x. Both scales are multiplied before they meet the sums, which onnxruntime then fuses. A bias is
    added by Sum, which it does not fuse: it would add it before the rows' scales (seen in 1.32).
    """
    zero_point = op.Constant(value=onnx.numpy_helper.from_array(np.array(_ZERO_POINT, np.uint8)))
    if input_scale is None:
        x, scale = _unit_rows(x, LARGEST_CODE[INT8])
        codes = op.QuantizeLinear(x, op.Constant(value_float=1.0), zero_point)
    else:
        scale, codes = input_scale, op.QuantizeLinear(x, input_scale, zero_point)
    sums = op.MatMulInteger(codes, op.Transpose(weight, perm=[1, 0]), zero_point)
    y = op.Mul(op.Cast(sums, to=onnx.TensorProto.FLOAT), op.Mul(scale, weight_scale))
    return y if bias is None else op.Sum(y, bias)


def _fp8_linear(x: Any, weight: Any, weight_scale: Any, bias: Any = None, input_scale: Any = None) -> Any:
    """`millrace::fp8_linear`: x86 has no such products, so that codes are multiplied as the numbers they are."""
    largest = LARGEST_CODE[FP8]
    if input_scale is None:
        steps, scale = _unit_rows(x, largest)
    else:
        steps, scale = op.Div(x, input_scale), input_scale
    limits = op.Constant(value_float=-largest), op.Constant(value_float=largest)
    codes = op.Cast(op.Clip(steps, *limits), to=onnx.TensorProto.FLOAT8E4M3FN)
    y = op.Mul(_times_written_out(op.Cast(codes, to=onnx.TensorProto.FLOAT), weight, weight_scale), scale)
    return y if bias is None else op.Add(y, bias)


def _int8_weight_linear(x: Any, weight: Any, weight_scale: Any) -> Any:
    return _times_written_out(x, weight, weight_scale)


def _unit_rows(x: Any, largest_code: float) -> tuple[Any, Any]:
    """Rows of `x` in steps of their largest code, and what a step of each stands for."""
    largest = op.Max(op.ReduceMax(op.Abs(x), [-1], keepdims=1), op.Constant(value_float=SMALLEST_MAGNITUDE))
    limit = op.Constant(value_float=largest_code)
    return op.Mul(x, op.Div(limit, largest)), op.Div(largest, limit)


def _times_written_out(x: Any, weight: Any, weight_scale: Any) -> Any:
    """`x` times 8-bit weights [N, K]; the transposition keeps onnxruntime from rounding `x` to INT8 in a fusion."""
    return op.MatMul(x, op.Transpose(op.DequantizeLinear(weight, weight_scale, axis=0), perm=[1, 0]))


def _contrib(name: str, inputs: list[tuple[str, str]], attributes: list[str]) -> Any:
    """An operation that onnxscript has no schema of, to be called like the others; its last inputs may be missing."""
    optional = {"zero_points": OpSchema.FormalParameterOption.Optional}
    parameters = [OpSchema.FormalParameter(one, kind, param_option=optional.get(one, _SINGLE)) for one, kind in inputs]
    schema = OpSchema(
        name,
        CONTRIB,
        1,
        inputs=parameters,
        outputs=[OpSchema.FormalParameter("output", "tensor(float)")],
        attributes=[OpSchema.Attribute(one, OpSchema.AttrType.INT) for one in attributes],
    )
    return Op(Opset(CONTRIB, 1), name, schema)


_SINGLE = OpSchema.FormalParameterOption.Single
_WEIGHTS = [("scales", "tensor(float)"), ("zero_points", "tensor(uint8)")]
_matmul_nbits = _contrib(
    "MatMulNBits",
    [("A", "tensor(float)"), ("B", "tensor(int16)"), *_WEIGHTS],
    ["K", "N", "bits", "block_size", "accuracy_level"],
)
_gather_block_quantized = _contrib(
    "GatherBlockQuantized",
    [("data", "tensor(int16)"), ("indices", "tensor(int64)"), *_WEIGHTS],
    ["bits", "block_size", "gather_axis", "quantize_axis"],
)


def _int4_weight_linear(x: Any, packed: Any, scales: Any, zeros: Any = None, int8_activations: bool = False) -> Any:
    groups, channels = scales.shape
    columns = x.shape[-1]
    return _matmul_nbits(
        x,
        packed,
        scales,
        zeros,
        K=columns,
        N=channels,
        bits=4,
        block_size=columns // groups,
        accuracy_level=_INT8_COMPUTE if int8_activations else _FLOAT_COMPUTE,
    )


def _int4_embedding(ids: Any, packed: Any, scales: Any, zeros: Any = None, columns: int = 0) -> Any:
    groups = scales.shape[0]
    return _gather_block_quantized(
        packed, ids, scales, zeros, bits=4, block_size=columns // groups, gather_axis=0, quantize_axis=1
    )


_WEIGHT_INPUTS = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
"""Places of codes, scales and zero points among the inputs; the last may be missing."""
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    int8_linear.default: _int8_linear,
    fp8_linear.default: _fp8_linear,
    int8_weight_linear.default: _int8_weight_linear,
    int4_weight_linear.default: _int4_weight_linear,
    int4_embedding.default: _int4_embedding,
}
"""What the exporter makes of each operation. 4-bit weights are still in our layout: see `lay_out_weights`."""


def lay_out_weights(model: onnx_ir.Model) -> None:
    """Brings 4-bit weights from the layout of `kernels.int4_layout` to that of the operations that read them.

    Those want the codes of two neighbours in a byte, the first in its lower half: [N, K / G, G / 2]; scales [N, K / G],
    and zero points like codes [N, ceil(K / G / 2)]. What two operations share stays shared.
    """
    done: set[onnx_ir.Value] = set()
    for node in list(model.graph.all_nodes()):
        if node.domain != CONTRIB:
            continue
        codes, scales, zeros = (
            node.inputs[place] if place < len(node.inputs) else None for place in _WEIGHT_INPUTS[node.op_type]
        )
        assert codes is not None
        assert scales is not None
        if codes not in done:
            group_size = node.attributes["block_size"].as_int()
            columns = group_size * _stored(scales).shape[0]
            _store(codes, _pairs(unpack(torch.from_numpy(_stored(codes)), columns).numpy(), group_size))
            _store(scales, np.ascontiguousarray(_stored(scales).T))
            if zeros is not None:
                _store(zeros, _pairs(_stored(zeros).T, _stored(zeros).shape[0])[:, 0])
            done.add(codes)
        if node.op_type == "GatherBlockQuantized":  # takes rows, not groups
            rows = onnx_ir.node("Constant", [], {"value_ints": [len(_stored(codes)), -1]})
            flat = onnx_ir.node("Reshape", [codes, rows.outputs[0]])
            model.graph.insert_before(node, [rows, flat])
            node.replace_input_with(0, flat.outputs[0])


def _stored(value: onnx_ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _store(value: onnx_ir.Value, array: NDArray[Any]) -> None:
    tensor = onnx_ir.tensor(array, name=value.name)
    value.const_value, value.shape, value.dtype = tensor, onnx_ir.Shape(array.shape), tensor.dtype


def _pairs(codes: NDArray[np.uint8], group_size: int) -> NDArray[np.uint8]:
    """Two neighbours of a group's 4-bit codes [N, K] in a byte [N, K / G, ceil(G / 2)], the first in its lower half."""
    groups = codes.reshape(len(codes), -1, group_size)
    even = np.pad(groups, ((0, 0), (0, 0), (0, group_size % 2)))
    pairs: NDArray[np.uint8] = even[..., 0::2] | even[..., 1::2] << 4
    return pairs
