# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""Makes Triton's interpreter (TRITON_INTERPRET=1) honest about bfloat16, for tests.

The interpreter of Triton 3.7 keeps bfloat16 as raw 16-bit integers: arithmetic, comparisons and products work on the
bits, and float32 is cut off instead of rounded to the nearest even. Here such values are computed in float32 and
rounded, as the hardware does.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend_bfloat16() -> None:
    """Replaces the interpreter's operations for the rest of this process; twice is as good as once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "mends_bfloat16", False):
        return
    builder.mends_bfloat16 = True
    binary_op, unary_op, ternary_op = builder.binary_op, builder.unary_op, builder.ternary_op
    create_dot, cast_impl, convert_float = builder.create_dot, builder.cast_impl, interpreter._convert_float

    def mended_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not _any_bfloat16(left, right):
            return binary_op(self, left, right, op)
        return _rounded(op(_widened(left), _widened(right)))

    def mended_unary(self: Any, operand: Any, op: Any) -> Any:
        return _rounded(op(_widened(operand))) if _any_bfloat16(operand) else unary_op(self, operand, op)

    def mended_ternary(self: Any, first: Any, second: Any, third: Any, op: Any) -> Any:
        if op is np.where:  # moves bits, whatever they mean
            return interpreter.TensorHandle(np.where(first.data, second.data, third.data), second.dtype.scalar)
        if not _any_bfloat16(first, second, third):
            return ternary_op(self, first, second, third, op)
        return _rounded(op(_widened(first), _widened(second), _widened(third)))

    def mended_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        if not _any_bfloat16(a, b):
            return create_dot(self, a, b, total, precision, imprecise)
        product = np.matmul(_widened(a), _widened(b), dtype=np.float32) + total.data
        return interpreter.TensorHandle(product.astype(total.data.dtype), total.dtype.scalar)

    def mended_cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return _rounded(source.data.astype(np.float32))
        if source.dtype.scalar == tl.bfloat16 and target.scalar != tl.bfloat16:
            return interpreter.TensorHandle(
                _widened(source).astype(interpreter._get_np_dtype(target.scalar)), target.scalar
            )
        return cast_impl(self, source, target)

    def mended_convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return _to_bits(values.view(np.float32))
        return convert_float(values, source, target, rounding)

    builder.binary_op, builder.unary_op, builder.ternary_op = mended_binary, mended_unary, mended_ternary
    builder.create_dot, builder.cast_impl, interpreter._convert_float = mended_dot, mended_cast, mended_convert


def _any_bfloat16(*handles: Any) -> bool:
    return any(handle.dtype.scalar == tl.bfloat16 for handle in handles)


def _widened(handle: Any) -> Any:
    """The values as an array that numpy can compute with."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounded(values: Any) -> Any:
    """Results as the interpreter keeps them: truth values as they are, numbers as the nearest bfloat16."""
    if values.dtype == np.bool_:
        return interpreter.TensorHandle(values, tl.int1)
    return interpreter.TensorHandle(_to_bits(values.astype(np.float32)), tl.bfloat16)


def _to_bits(values: Any) -> Any:
    nearest = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return nearest.view(torch.int16).numpy().view(np.uint16)
