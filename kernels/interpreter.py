# Triton has no types:
# mypy: disable-error-code="import-untyped"
"""Makes Triton's interpreter (TRITON_INTERPRET=1) compute what a GPU computes, for tests.

The interpreter of Triton 3.6 and 3.7 keeps bfloat16 and 8-bit floats as raw bits: it adds, compares and multiplies the
bits, cuts bfloat16 off instead of rounding it, loses the carry of a rounded 8-bit float (up to twice its value) and
lets large ones overflow. It multiplies float32 exactly where a GPU takes TF32, and adds float16 up in float32. Here:

- bfloat16 is computed in float32 and rounded to the nearest even;
- 8-bit floats round to the nearest even and saturate, and nothing but products may be computed with them, because
  nothing else compiles;
- `tl.dot` of float32 with `input_precision="tf32"`, the default, loses the 13 bits that tensor cores do not read;
- a sum of float16 rounds at every addition.

Not imitated: that the tensor cores of sm_90 add up products of 8-bit floats in fewer bits than float32 has
(`max_num_imprecise_acc`), and the last bits of a GPU's `exp`, `log` and division.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_KEPT_AS_BITS = {tl.bfloat16: torch.bfloat16, **_FLOAT8}
_FORMATS = {tl.float32: torch.float32, tl.float16: torch.float16, **_KEPT_AS_BITS}
_BITS = {8: (torch.uint8, np.uint8), 16: (torch.int16, np.uint16), 32: (torch.int32, np.uint32)}
_TF32, _TF32X3 = interpreter._ir.INPUT_PRECISION.TF32, interpreter._ir.INPUT_PRECISION.TF32x3
_TOWARDS_ZERO = interpreter._ir.ROUNDING_MODE.RTZ


class InterpreterHonestyError(TypeError):
    """A kernel computes what no GPU compiles; Triton's InterpreterError carries its text."""


def mend_interpreter() -> None:
    """Replaces the interpreter's operations for the rest of this process; twice is as good as once."""
    builder, reduction = interpreter.InterpreterBuilder, interpreter.ReduceOps
    if getattr(builder, "is_mended", False):
        return
    builder.is_mended = True
    binary_op, unary_op, ternary_op = builder.binary_op, builder.unary_op, builder.ternary_op
    create_dot, create_fma, cast_impl = builder.create_dot, builder.create_fma, builder.cast_impl
    convert_float, plain_sum = interpreter._convert_float, reduction.sum
    patch_language, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def mended_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not _kept_as_bits(left, right):
            return binary_op(self, left, right, op)
        return _bfloat16(op(_computable(left), _computable(right)))

    def mended_unary(self: Any, operand: Any, op: Any) -> Any:
        return _bfloat16(op(_computable(operand))) if _kept_as_bits(operand) else unary_op(self, operand, op)

    def mended_ternary(self: Any, first: Any, second: Any, third: Any, op: Any) -> Any:
        if op is np.where:  # moves bits, whatever they mean
            return interpreter.TensorHandle(np.where(first.data, second.data, third.data), second.dtype.scalar)
        if not _kept_as_bits(first, second, third):
            return ternary_op(self, first, second, third, op)
        return _bfloat16(op(_computable(first), _computable(second), _computable(third)))

    def mended_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _kept_as_bits(x, y, z):
            return create_fma(self, x, y, z)
        return _bfloat16(_computable(x) * _computable(y) + _computable(z))

    def mended_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        if _kept_as_bits(a, b):
            products = [(_values(a), _values(b))]
        elif a.data.dtype == np.float32 and precision == _TF32:
            products = [(_tf32(a.data), _tf32(b.data))]
        elif a.data.dtype == np.float32 and precision == _TF32X3:
            products = _tf32_times_3(a.data, b.data)
        else:
            return create_dot(self, a, b, total, precision, imprecise)
        product = sum(np.matmul(left, right, dtype=np.float32) for left, right in products) + total.data
        return interpreter.TensorHandle(product.astype(total.data.dtype), total.dtype.scalar)

    def mended_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == target.scalar or not _KEPT_AS_BITS.keys() & {source.dtype.scalar, target.scalar}:
            return cast_impl(self, source, target)
        values = _values(source)
        if target.scalar in _KEPT_AS_BITS:
            return interpreter.TensorHandle(_to_bits(values, target.scalar), target.scalar)
        return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(target.scalar)), target.scalar)

    def mended_convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source not in _FORMATS or target not in _FORMATS:
            return convert_float(values, source, target, rounding)
        return _to_bits(_from_bits(values, source), target, rounding)

    def mended_sum(self: Any, operand: Any) -> Any:
        if operand.dtype.scalar != tl.float16:
            return plain_sum(self, operand)
        values = operand.handle.data
        total = _halved(values.reshape(-1), 0) if self.axis is None else _halved(values, self.axis)
        if self.keep_dims:
            total = total.reshape((1,) * values.ndim) if self.axis is None else np.expand_dims(total, self.axis)
        return self.to_tensor(total, operand.dtype)

    def run_anew(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        return run(self, *arguments, **named)

    def patch_once(function: Any) -> Any:
        """Once for each module in a launch: at each call of a device function it took a fourth of the time."""
        if (module := id(function.__globals__)) in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch_language(function)

    builder.binary_op, builder.unary_op, builder.ternary_op = mended_binary, mended_unary, mended_ternary
    builder.create_dot, builder.create_fma, builder.cast_impl = mended_dot, mended_fma, mended_cast
    builder.get_bf16 = lambda self, value: _bfloat16(np.array([value]))
    interpreter._convert_float, reduction.sum = mended_convert, mended_sum
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_anew


def _kept_as_bits(*handles: Any) -> bool:
    return any(handle.dtype.scalar in _KEPT_AS_BITS for handle in handles)


def _computable(handle: Any) -> Any:
    """The values that arithmetic may use."""
    if handle.dtype.scalar in _FLOAT8:
        raise InterpreterHonestyError(f"arithmetic on {handle.dtype.scalar} does not compile: convert it first")
    return _values(handle)


def _values(handle: Any) -> Any:
    """The values as an array that numpy can compute with."""
    kind = handle.dtype.scalar
    return _from_bits(handle.data, kind) if kind in _KEPT_AS_BITS else handle.data


def _from_bits(values: Any, kind: Any) -> Any:
    """float32 of values kept in a format of `_FORMATS`, as bits or not."""
    plain = np.ascontiguousarray(values)
    of_torch, of_numpy = _BITS[8 * plain.itemsize]
    return torch.from_numpy(plain.view(of_numpy).copy()).view(of_torch).view(_FORMATS[kind]).float().numpy()


def _to_bits(values: Any, kind: Any, rounding: Any = None) -> Any:
    """Values in a format of `_FORMATS`, as bits: to the nearest even, or towards zero; 8-bit floats saturate."""
    exact = torch.from_numpy(np.array(values, dtype=np.float32))
    if kind in _FLOAT8:
        largest = torch.finfo(_FLOAT8[kind]).max
        exact = exact.clamp(-largest, largest)  # NaN stays
    rounded = exact.to(_FORMATS[kind])
    of_torch, of_numpy = _BITS[8 * rounded.itemsize]
    bits = rounded.view(of_torch).numpy().view(of_numpy)
    if rounding == _TOWARDS_ZERO:  # in all of these formats, the next number towards zero is one less
        bits = bits - (rounded.float().abs() > exact.abs()).numpy()
    return bits


def _bfloat16(values: Any) -> Any:
    """Results as the interpreter keeps them: truth values as they are, numbers as the nearest bfloat16."""
    if values.dtype == np.bool_:
        return interpreter.TensorHandle(values, tl.int1)
    return interpreter.TensorHandle(_to_bits(values, tl.bfloat16), tl.bfloat16)


def _tf32(values: Any) -> Any:
    """What tensor cores read of float32: 10 bits of the fraction. No instruction rounds before (seen in the PTX)."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _tf32_times_3(a: Any, b: Any) -> list[tuple[Any, Any]]:
    """Each operand as two TF32 numbers; the product of the two small ones is left out. (A GPU rounds to them.)"""
    large_a, large_b = _tf32(a), _tf32(b)
    small_a, small_b = _tf32(a - large_a), _tf32(b - large_b)
    return [(small_a, large_b), (large_a, small_b), (large_a, large_b)]


def _halved(values: Any, axis: int) -> Any:
    """Sum along an axis whose length is a power of two, as a GPU adds: halves onto each other, in the given type."""
    while values.shape[axis] > 1:
        first, second = np.split(values, 2, axis)
        values = first + second
    return values.squeeze(axis)
