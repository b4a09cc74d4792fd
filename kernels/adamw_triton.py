# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""AdamW and the gradient's norm in the Triton language: kernels and the functions that launch them (`kernels.adamw`).

One launch serves all tensors of a list, a few flat shards or hundreds of weights: a program takes a chunk of one of
them and finds it in a table of addresses. Whole blocks are read without a mask, four elements or more at once, and so
few registers hold them that half a GPU's threads wait for memory at a time. What depends on the gradient's norm is read
from the device, where every program works it out for itself.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_constants import constants
from kernels.within_reach import reaching


class _Constants(NamedTuple):
    block: int
    """Elements at a time."""
    blocks_per_chunk: int
    """Blocks that a program takes one after the other: enough that the look-ups of its start do not count."""
    num_warps: int


_UPDATE = {80: _Constants(1024, 8, 4)}  # 8 elements of each tensor a thread, in 56 registers: a GPU half full
_SQUARES = {80: _Constants(4096, 16, 8)}
_SUM_BLOCK = 1024
_COUNT_BLOCK = 256
_NARROW = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _pointer(table_ptr, row, tensor, num_tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + row * num_tensors + tensor).to(tl.pointer_type(DTYPE))
    # four elements a thread whatever their width: one layout for all tensors, none of which then changes threads
    return tl.multiple_of(pointer, DTYPE.primitive_bitwidth // 2) if ALIGNED else pointer


@triton.jit
def _factor(squares_ptr, max_norm, loss_scale):
    """What gradients are multiplied by, and whether all of them, on all ranks, are finite."""
    factor = 1.0 / loss_scale
    finite = True
    if squares_ptr is not None:
        squares = tl.load(squares_ptr)
        finite = squares < float("inf")
        if max_norm > 0:
            norm = tl.sqrt(squares) * factor
            factor = (factor * tl.minimum(1.0, max_norm / (norm + 1e-6))).to(tl.float32)
    return factor, finite


@triton.jit(do_not_specialize=["num_tensors"])
def _squares(table_ptr, tensor_ptr, chunk_ptr, sums_ptr, num_tensors, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
             CHUNK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tensor_ptr + program)
    # counted from the 16 bytes that the tensor starts in, so that blocks are aligned however the tensor is not
    address = tl.load(table_ptr + tensor)
    x_ptr = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
    head = address % 16 // (DTYPE.primitive_bitwidth // 8)
    end = head + tl.load(table_ptr + num_tensors + tensor)
    first = tl.load(chunk_ptr + program).to(tl.int64) * CHUNK
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.float64)
    for start in range(first, tl.minimum(first + CHUNK, end), BLOCK):
        offsets = start + columns  # [BLOCK]
        if (start >= head) & (start + BLOCK <= end):
            x = tl.load(x_ptr + offsets).to(tl.float32)
        else:
            x = tl.load(x_ptr + offsets, mask=(offsets >= head) & (offsets < end), other=0.0).to(tl.float32)
        # squares of float32 may not fit: scaled by the power of two at the largest, an exact operation, they do
        largest = tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.minimum(tl.maximum(largest, 1 << 23), 253 << 23)
        scaled = x * ((254 << 23) - power).to(tl.float32, bitcast=True)
        wide = power.to(tl.float32, bitcast=True).to(tl.float64)
        total += tl.sum(scaled * scaled, 0).to(tl.float64) * wide * wide
    tl.store(sums_ptr + program, total)


@triton.jit(do_not_specialize=["num_sums"])
def _sum(sums_ptr, total_ptr, num_sums, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    lanes = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_sums, BLOCK):  # always in this order: the same bits on every run
        lanes += tl.load(sums_ptr + start + columns, mask=start + columns < num_sums, other=0.0)
    tl.store(total_ptr, tl.sum(lanes, 0))


@triton.jit
def _update_block(
    weight_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, offsets, inside,
    factor, step_size, root, new1, new2, eps, decay, COPY: tl.constexpr,
):  # fmt: skip
    gradient = tl.load(gradient_ptr + offsets, mask=inside).to(tl.float32) * factor  # [BLOCK]
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=inside)  # [BLOCK]
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=inside)  # [BLOCK]
    weight = tl.load(weight_ptr + offsets, mask=inside)  # [BLOCK]
    exp_avg += new1 * (gradient - exp_avg)
    exp_avg_sq += new2 * (gradient * gradient - exp_avg_sq)
    weight -= decay * weight + step_size * exp_avg / (tl.sqrt(exp_avg_sq) * root + eps)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=inside)
    tl.store(weight_ptr + offsets, weight, mask=inside)
    if COPY is not None:
        tl.store(copy_ptr + offsets, weight.to(COPY), mask=inside)


@triton.jit(do_not_specialize=["num_tensors"])
def _update(
    table_ptr, tensor_ptr, chunk_ptr, squares_ptr, num_tensors,
    learning_rate, log_beta1, log_beta2, new1, new2, eps, decay, max_norm, loss_scale,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tensor_ptr + program)
    first = tl.load(chunk_ptr + program).to(tl.int64) * CHUNK
    weight_ptr = _pointer(table_ptr, 0, tensor, num_tensors, tl.float32, ALIGNED)
    gradient_ptr = _pointer(table_ptr, 1, tensor, num_tensors, GRADIENT, ALIGNED)
    exp_avg_ptr = _pointer(table_ptr, 2, tensor, num_tensors, tl.float32, ALIGNED)
    exp_avg_sq_ptr = _pointer(table_ptr, 3, tensor, num_tensors, tl.float32, ALIGNED)
    copy_ptr = weight_ptr if COPY is None else _pointer(table_ptr, 4, tensor, num_tensors, COPY, ALIGNED)
    step = tl.load(_pointer(table_ptr, 5, tensor, num_tensors, tl.float32, False)) + 1.0
    end = tl.minimum(first + CHUNK, tl.load(table_ptr + 6 * num_tensors + tensor))

    # 1 - beta^step, of which float32 would lose most digits while steps are few
    correction1 = 1.0 - tl.exp(step.to(tl.float64) * log_beta1)
    correction2 = 1.0 - tl.exp(step.to(tl.float64) * log_beta2)
    step_size = (learning_rate / correction1).to(tl.float32)
    root = (1.0 / tl.sqrt(correction2)).to(tl.float32)
    factor, finite = _factor(squares_ptr, max_norm, loss_scale)
    if finite:
        columns = tl.arange(0, BLOCK)
        whole_end = first + (end - first) // BLOCK * BLOCK
        for start in range(first, whole_end, BLOCK):
            _update_block(
                weight_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, start + columns, None,
                factor, step_size, root, new1, new2, eps, decay, COPY,
            )  # fmt: skip
        if whole_end < end:
            offsets = whole_end + columns
            _update_block(
                weight_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, offsets, offsets < end,
                factor, step_size, root, new1, new2, eps, decay, COPY,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_tensors"])
def _count(table_ptr, squares_ptr, num_tensors, BLOCK: tl.constexpr):
    # after the update, all of whose programs have read the number of updates before it
    _, finite = _factor(squares_ptr, 0.0, 1.0)
    if finite:
        for start in range(0, num_tensors, BLOCK):
            tensors = start + tl.arange(0, BLOCK)
            inside = tensors < num_tensors
            addresses = tl.load(table_ptr + 5 * num_tensors + tensors, mask=inside, other=0)
            step_ptr = addresses.to(tl.pointer_type(tl.float32))  # [BLOCK]
            tl.store(step_ptr, tl.load(step_ptr, mask=inside) + 1.0, mask=inside)


def gradient_squares(gradients: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements [], float64; not finite where an element is not.

    Args:
        gradients: Of one dtype and device, any shapes; at least one.
    """
    device, made = gradients[0].device, constants(_SQUARES, gradients[0].device)
    flat = [gradient.contiguous() for gradient in gradients]
    addresses = tuple(gradient.data_ptr() for gradient in flat)
    sizes = tuple(gradient.numel() for gradient in flat)
    width = gradients[0].element_size()
    spans = tuple(size and size + address % 16 // width for address, size in zip(addresses, sizes, strict=True))
    chunk = made.block * made.blocks_per_chunk
    tensor_of, chunk_of = _chunks(spans, chunk, device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_programs = tensor_of.numel()
    if num_programs:
        sums = torch.empty(num_programs, dtype=torch.float64, device=device)
        with reaching(flat):
            _squares[(num_programs,)](
                _table((addresses, sizes), device), tensor_of, chunk_of, sums, len(flat),
                DTYPE=_NARROW[gradients[0].dtype], BLOCK=made.block, CHUNK=chunk, num_warps=made.num_warps,
            )  # fmt: skip
        _sum[(1,)](sums, total, num_programs, BLOCK=_SUM_BLOCK)
    return total


def adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    squares: Tensor | None,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    loss_scale: float,
) -> None:
    """One update, in place; arguments as those of `kernels.adamw.adamw`, `copies` empty where there are none."""
    device, made = weights[0].device, constants(_UPDATE, weights[0].device)
    flat = [gradient.contiguous() for gradient in gradients]
    stored = (weights, flat, exp_avgs, exp_avg_sqs, copies or weights, steps)
    rows = tuple(tuple(tensor.data_ptr() for tensor in some) for some in stored)
    sizes = tuple(weight.numel() for weight in weights)
    table = _table((*rows, sizes), device)
    chunk = made.block * made.blocks_per_chunk
    tensor_of, chunk_of = _chunks(sizes, chunk, device)
    with reaching(*stored):
        if tensor_of.numel():
            _update[(tensor_of.numel(),)](
                table, tensor_of, chunk_of, squares, len(weights), learning_rate, _log(beta1), _log(beta2),
                1 - beta1, 1 - beta2, eps, learning_rate * weight_decay, max_norm, loss_scale,
                GRADIENT=_NARROW[flat[0].dtype], COPY=_NARROW[copies[0].dtype] if copies else None,
                ALIGNED=all(address % 16 == 0 for row in rows[:5] for address in row),
                BLOCK=made.block, CHUNK=chunk, num_warps=made.num_warps,
            )  # fmt: skip
        _count[(1,)](table, squares, len(weights), BLOCK=_COUNT_BLOCK, num_warps=1)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each program, which tensor it works on and which chunk of that, int32; built once for a list of sizes."""
    counts = torch.tensor([triton.cdiv(size, chunk) for size in sizes])
    tensor_of = torch.repeat_interleave(counts)
    chunk_of = torch.arange(len(tensor_of)) - (counts.cumsum(0) - counts)[tensor_of]
    return _upload(tensor_of.int(), device), _upload(chunk_of.int(), device)


@lru_cache(maxsize=64)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Addresses and sizes [rows, tensors], int64; built again when the allocator has given other ones."""
    return _upload(torch.tensor(rows), device)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """The table on the device; from pinned memory, so that the host does not wait."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
