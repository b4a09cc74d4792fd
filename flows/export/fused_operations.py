"""Attention and norms as ONNX operations that onnxruntime computes in few passes.

A program of a few million weights in few bits spends more time between its products than in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript import opset18
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

op: Any = opset18  # its types are those of onnxscript's own language
HIDDEN = float(np.finfo(np.float32).min)
"""Added to the score of a key that must not be looked at, whose weight is then exactly 0 beside any other's; where
there is no other, no NaN arises, as it would with infinity."""


def _attention(
    q: Any,
    k: Any,
    v: Any,
    visible: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention to the keys that a mask of booleans allows; other kinds are left to the exporter's own translation.

    Query heads that share keys and values are put one behind the other, as more queries of one head, so that keys and
    values are not repeated; the mask is, once for all layers.
    """
    if visible is None or visible.dtype != onnx_ir.DataType.BOOL or dropout_p:
        return aten_scaled_dot_product_attention(q, k, v, visible, dropout_p, is_causal, scale, enable_gqa)
    heads, groups, width = q.shape[1], k.shape[1], q.shape[3]
    hidden = op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=HIDDEN))
    if heads != groups:
        q = op.Reshape(q, op.Constant(value_ints=[0, groups, -1, width]))
        hidden = op.Concat(*[hidden] * (heads // groups), axis=2)
    products = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    scores = op.Mul(products, op.Constant(value_float=scale or width**-0.5))
    found = op.MatMul(op.Softmax(op.Add(scores, hidden), axis=-1), v)
    return op.Reshape(found, op.Constant(value_ints=[0, heads, -1, width])) if heads != groups else found


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention
}
"""What the exporter makes of each operation."""


def divide_by_roots(model: onnx_ir.Model) -> None:
    """Writes x * (1 / sqrt(y)) as x / sqrt(y): in this form onnxruntime knows a norm and computes it in one pass."""
    for node in list(model.graph.all_nodes()):
        root = node.inputs[0] if node.op_type == "Reciprocal" else None
        source = root.producer() if root is not None else None
        if source is None or source.op_type != "Sqrt":
            continue
        inverse = node.outputs[0]
        for product, place in list(inverse.uses()):
            if product.op_type == "Mul":
                quotient = onnx_ir.node("Div", [product.inputs[1 - place], root])
                model.graph.insert_before(product, quotient)
                product.outputs[0].replace_all_uses_with(quotient.outputs[0])
                model.graph.remove(product, safe=True)
        if not inverse.uses():
            model.graph.remove(node, safe=True)
