# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Attention over a paged cache in the Triton language: kernels and the function that launches them.

Reading the cache is all that counts. A program reads one head's keys and values of a fixed number of tokens once, for
all query heads that share them, which fill the 16 rows that a matrix unit takes at least; a second kernel merges a
sequence's parts in order. Parts are of fixed size, not a share of the sequence, so that no bit depends on the batch.
Registered in `kernels.paged_decode_attention`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch_constants import constants
from kernels.whole_rows import whole_rows


class _Launch(NamedTuple):
    """Tokens of a part, bytes of keys in flight at once, parts merged at once, and how the kernel runs."""

    part: int
    tile_bytes: int
    merged: int
    warps: int
    stages: int


_CONSTANTS = {
    0: _Launch(32, 1024, 2, 4, 1),  # the interpreter: several parts in short sequences
    80: _Launch(256, 16384, 16, 4, 3),
}
"""By architecture; 256 tokens occupy every processor with one sequence of 4096 and 8 heads. Not measured."""


@triton.jit
def _attend_to_part(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, y_ptr, lse_ptr,
    q_sequence, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row, width, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part, key_head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_parts, num_key_heads = tl.num_programs(0), tl.num_programs(1)
    begin = part * PART
    end = tl.minimum(begin + PART, tl.load(lengths_ptr + sequence).to(tl.int32))
    if begin >= end:
        return
    member, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = key_head * GROUP + member
    row_inside, columns_inside = member < GROUP, (columns < width)[None, :]
    inside = row_inside[:, None] & columns_inside
    q = tl.load(q_ptr + sequence * q_sequence + head[:, None] * q_head + columns[None, :], mask=inside, other=0.0)
    k_ptr += key_head * k_head
    v_ptr += key_head * v_head
    table_ptr += sequence * table_row
    y = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    best = tl.full((ROWS,), -float("inf"), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        cached = token < end
        page = tl.load(table_ptr + token // PAGE, mask=cached, other=0).to(tl.int64)  # [BLOCK]
        slot = (token % PAGE).to(tl.int64)
        tile_inside = cached[:, None] & columns_inside
        k_tile = k_ptr + (page * k_page + slot * k_slot)[:, None] + columns[None, :]
        k = tl.load(k_tile, mask=tile_inside, other=0.0)  # [BLOCK, WIDTH]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, BLOCK]
        scores = tl.where(cached[None, :], scores, -float("inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - better[:, None])
        shrink = tl.exp2(best - better)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = v_ptr + (page * v_page + slot * v_slot)[:, None] + columns[None, :]
        v = tl.load(v_tile, mask=tile_inside, other=0.0)  # [BLOCK, WIDTH]
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")  # [ROWS, WIDTH]
        best = better
    place = (sequence * num_key_heads * GROUP + head) * num_parts + part  # [ROWS]
    tl.store(lse_ptr + place, best + tl.log2(total), mask=row_inside)
    tl.store(y_ptr + place[:, None] * width + columns[None, :], y / total[:, None], mask=inside)


@triton.jit
def _merge(
    parts_ptr, lse_ptr, lengths_ptr, y_ptr, num_parts, width,
    WIDTH: tl.constexpr, PART: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(1).to(tl.int64)
    row = sequence * tl.num_programs(0) + tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    columns_inside = columns < width
    used = tl.cdiv(tl.load(lengths_ptr + sequence).to(tl.int32), PART)  # parts behind the length were not written
    y = tl.zeros((WIDTH,), tl.float32)
    total = tl.zeros((1,), tl.float32)
    best = tl.full((1,), -1e30, tl.float32)
    for start in range(0, used, MERGED):
        part = start + tl.arange(0, MERGED)
        written = part < used
        lse = tl.load(lse_ptr + row * num_parts + part, mask=written, other=-float("inf"))  # [MERGED]
        tile = (row * num_parts + part)[:, None] * width + columns[None, :]
        means = tl.load(parts_ptr + tile, mask=written[:, None] & columns_inside[None, :], other=0.0)
        better = tl.maximum(best, tl.max(lse, 0))
        weights = tl.exp2(lse - better)  # [MERGED]
        shrink = tl.exp2(best - better)
        total = total * shrink + tl.sum(weights, 0)
        y = y * shrink + tl.sum(weights[:, None] * means, 0)  # [WIDTH]
        best = better
    y = y / tl.where(total == 0.0, 1.0, total)  # an empty sequence has no values: zero
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=columns_inside)


def paged_decode_attention_fwd(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor
) -> Tensor:
    """Means of each sequence's cached values [S, H, K] in the dtype of `q`.

    Args:
        q: Queries [S, H, K]; of these three a row's elements lie together, all else as it may.
        k_pages: Cached keys [P, page size, G, K].
        v_pages: Cached values [P, page size, G, K].
        page_table: Numbers of each sequence's pages [S, M].
        lengths: Tokens of each sequence in the cache [S].
    """
    sequences, heads, width = q.shape
    _, page, key_heads, _ = k_pages.shape
    q, k_pages, v_pages = whole_rows(q), whole_rows(k_pages), whole_rows(v_pages)
    page_table = whole_rows(page_table)
    lengths = lengths.contiguous()
    launch = constants(_CONSTANTS, q.device)
    num_parts = max(1, triton.cdiv(page_table.shape[1] * page, launch.part))
    y = torch.empty((sequences, heads, width), dtype=q.dtype, device=q.device)
    if y.numel():
        parts = torch.empty((sequences, heads, num_parts, width), dtype=torch.float32, device=q.device)
        lse = torch.empty((sequences, heads, num_parts), dtype=torch.float32, device=q.device)
        group, padded = heads // key_heads, max(16, triton.next_power_of_2(width))
        block = min(launch.part, max(16, launch.tile_bytes // (padded * q.element_size())))
        _attend_to_part[(num_parts, key_heads, sequences)](
            q, k_pages, v_pages, page_table, lengths, parts, lse,
            *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0), width,
            width**-0.5 * math.log2(math.e), GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), WIDTH=padded,
            PAGE=page, PART=launch.part, BLOCK=block, num_stages=launch.stages,
            num_warps=launch.warps * q.element_size() // 2,  # float32 has no matrix unit and takes registers instead
        )  # fmt: skip
        _merge[(heads, sequences)](
            parts, lse, lengths, y, num_parts, width, WIDTH=padded, PART=launch.part, MERGED=launch.merged
        )
    return y
