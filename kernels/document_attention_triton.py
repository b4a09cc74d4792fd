# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Causal attention within documents in the Triton language: kernels and the functions that launch them.

FlashAttention-2 (arXiv:2307.08691): a program keeps a block of queries, or in the backward pass of keys, and walks over
the other side between bounds that it reads from the documents' ends; only blocks at the borders are masked, so that the
inner loops are two or four matrix products and the exponentials. Logarithms are to base 2, which is what GPUs compute.
Registered in `kernels.document_attention`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.document_attention import empty_beside
from kernels.launch_constants import constants
from kernels.whole_rows import whole_rows


class _Launch(NamedTuple):
    """Rows of the block that a program keeps, rows of those that it walks over, and how it runs."""

    kept: int
    walked: int
    warps: int
    stages: int


class _Launches(NamedTuple):
    forward: _Launch
    queries: _Launch
    keys: _Launch


_WIDE, _NARROW, _RAGGED, _FLOAT32 = "heads of 128", "heads up to 64", "between powers of two", "float32"
_CONSTANTS = {
    0: dict.fromkeys(  # the interpreter: several blocks in short sequences, and of unequal sizes
        (_WIDE, _NARROW, _RAGGED, _FLOAT32),
        _Launches(_Launch(32, 16, 4, 1), _Launch(16, 32, 4, 1), _Launch(32, 16, 4, 1)),
    ),
    80: {
        _WIDE: _Launches(_Launch(128, 64, 8, 3), _Launch(128, 32, 8, 2), _Launch(64, 64, 8, 2)),
        _NARROW: _Launches(_Launch(128, 32, 4, 3), _Launch(128, 64, 8, 2), _Launch(128, 64, 8, 2)),
        _RAGGED: _Launches(_Launch(64, 64, 4, 3), _Launch(64, 64, 8, 2), _Launch(64, 32, 4, 2)),
        _FLOAT32: _Launches(_Launch(32, 16, 8, 1), _Launch(16, 16, 8, 1), _Launch(16, 16, 8, 1)),
    },
    90: {
        _WIDE: _Launches(_Launch(128, 64, 8, 3), _Launch(128, 64, 8, 2), _Launch(128, 64, 8, 2)),
        _NARROW: _Launches(_Launch(128, 128, 8, 3), _Launch(128, 64, 8, 3), _Launch(128, 64, 8, 3)),
        _RAGGED: _Launches(_Launch(128, 64, 8, 3), _Launch(128, 32, 8, 3), _Launch(128, 32, 8, 3)),
        _FLOAT32: _Launches(_Launch(32, 16, 8, 1), _Launch(16, 16, 8, 1), _Launch(16, 16, 8, 1)),
    },
}
"""Block sizes by architecture: what compiles without spilling; not measured. Architecture 100 takes 90's."""


PRECISION = tl.constexpr("ieee")


@triton.jit
def _load(pointers, rows_inside, columns_inside, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    if ALL_ROWS and ALL_COLUMNS:
        return tl.load(pointers)
    elif ALL_ROWS:
        return tl.load(pointers, mask=columns_inside[None, :], other=0.0)
    elif ALL_COLUMNS:
        return tl.load(pointers, mask=rows_inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=rows_inside[:, None] & columns_inside[None, :], other=0.0)


@triton.jit
def _key_bounds(first_ptr, block_start, length, KEPT: tl.constexpr, WALKED: tl.constexpr):
    """Where a block of queries starts to look, where it sees every key, where that ends, and where all ends."""
    end = tl.minimum(block_start + KEPT, length)
    diagonal = block_start // WALKED * WALKED
    begin = tl.load(first_ptr + block_start) // WALKED * WALKED
    whole = tl.minimum(tl.cdiv(tl.load(first_ptr + end - 1), WALKED) * WALKED, diagonal)
    return begin, whole, diagonal, end


@triton.jit
def _look(
    y, total, best, q, k_ptr, v_ptr, k_row, v_row, rows, first, columns, columns_inside, begin, end, length, scale,
    BORDER: tl.constexpr, ALL_COLUMNS: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    """The online softmax of a block of queries, taken over the keys from `begin` to `end`."""
    keys = tl.arange(0, WALKED)
    k_tile = keys[:, None] * k_row + columns[None, :]  # [WALKED, WIDTH]; within a tile 32 bits are enough
    v_tile = keys[:, None] * v_row + columns[None, :]
    k_ptr += begin.to(tl.int64) * k_row
    v_ptr += begin.to(tl.int64) * v_row
    for start in range(begin, end, WALKED):
        keys_inside = start + keys < length
        k = _load(k_ptr + k_tile, keys_inside, columns_inside, not BORDER, ALL_COLUMNS)  # [WALKED, WIDTH]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [KEPT, WALKED]
        if BORDER:
            key = (start + keys)[None, :]
            scores = tl.where((key <= rows[:, None]) & (key >= first[:, None]), scores, -float("inf"))
        better = tl.maximum(best, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - better[:, None])
        shrink = tl.exp2(best - better)
        total = total * shrink + tl.sum(weights, 1)
        v = _load(v_ptr + v_tile, keys_inside, columns_inside, not BORDER, ALL_COLUMNS)  # [WALKED, WIDTH]
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision=PRECISION)  # [KEPT, WIDTH]
        best = better
        k_ptr += WALKED * k_row
        v_ptr += WALKED * v_row
    return y, total, best


@triton.jit(do_not_specialize=["length"])
def _forward(
    q_ptr, k_ptr, v_ptr, first_ptr, y_ptr, lse_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, length, width, scale,
    GROUP: tl.constexpr, ALL_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0)
    block_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * KEPT  # the longest walks first
    rows, columns = block_start + tl.arange(0, KEPT), tl.arange(0, WIDTH)
    rows_inside, columns_inside = rows < length, columns < width
    first_ptr += batch * length
    begin, whole, diagonal, end = _key_bounds(first_ptr, block_start, length, KEPT, WALKED)
    first = tl.load(first_ptr + rows, mask=rows_inside, other=0)  # [KEPT]
    q_tile = q_ptr + batch * q_batch + head * q_head + rows.to(tl.int64)[:, None] * q_row + columns[None, :]
    q = _load(q_tile, rows_inside, columns_inside, False, ALL_COLUMNS)  # [KEPT, WIDTH]
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    y = tl.zeros((KEPT, WIDTH), tl.float32)
    total = tl.zeros((KEPT,), tl.float32)
    best = tl.full((KEPT,), -1e30, tl.float32)  # not infinite: a row may see nothing of a block
    # from the first key to the last, so that no bit depends on where other documents begin
    y, total, best = _look(
        y, total, best, q, k_ptr, v_ptr, k_row, v_row, rows, first, columns, columns_inside, begin, whole, length,
        scale, True, ALL_COLUMNS, WALKED,
    )  # fmt: skip
    y, total, best = _look(
        y, total, best, q, k_ptr, v_ptr, k_row, v_row, rows, first, columns, columns_inside, whole, diagonal, length,
        scale, False, ALL_COLUMNS, WALKED,
    )  # fmt: skip
    y, total, best = _look(
        y, total, best, q, k_ptr, v_ptr, k_row, v_row, rows, first, columns, columns_inside, diagonal, end, length,
        scale, True, ALL_COLUMNS, WALKED,
    )  # fmt: skip
    y_tile = y_ptr + ((batch * length + rows)[:, None] * num_heads + head) * width + columns[None, :]
    inside = rows_inside[:, None] & columns_inside[None, :]
    tl.store(y_tile, (y / total[:, None]).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + (batch * num_heads + head) * length + rows, (best + tl.log2(total)) / scale, mask=rows_inside)


@triton.jit
def _look_back(
    dq, q, dy, k_ptr, v_ptr, k_row, v_row, rows, first, lse, delta, columns, columns_inside, begin, end, length, scale,
    BORDER: tl.constexpr, ALL_COLUMNS: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of a block of queries what the keys from `begin` to `end` contribute."""
    keys = tl.arange(0, WALKED)
    k_tile = keys[:, None] * k_row + columns[None, :]  # [WALKED, WIDTH]
    v_tile = keys[:, None] * v_row + columns[None, :]
    k_ptr += begin.to(tl.int64) * k_row
    v_ptr += begin.to(tl.int64) * v_row
    for start in range(begin, end, WALKED):
        keys_inside = start + keys < length
        k = _load(k_ptr + k_tile, keys_inside, columns_inside, not BORDER, ALL_COLUMNS)  # [WALKED, WIDTH]
        v = _load(v_ptr + v_tile, keys_inside, columns_inside, not BORDER, ALL_COLUMNS)  # [WALKED, WIDTH]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None]  # [KEPT, WALKED]
        if BORDER:
            key = (start + keys)[None, :]
            scores = tl.where((key <= rows[:, None]) & (key >= first[:, None]), scores, -float("inf"))
        weights = tl.exp2(scores)
        dweights = tl.dot(dy, tl.trans(v), input_precision=PRECISION)  # [KEPT, WALKED]
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)  # [KEPT, WIDTH]
        k_ptr += WALKED * k_row
        v_ptr += WALKED * v_row
    return dq


@triton.jit(do_not_specialize=["length"])
def _backward_queries(
    dy_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, first_ptr, dq_ptr, delta_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, length, width, scale, score_scale,
    GROUP: tl.constexpr, ALL_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0)
    block_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * KEPT  # the longest walks first
    rows, columns = block_start + tl.arange(0, KEPT), tl.arange(0, WIDTH)
    rows_inside, columns_inside = rows < length, columns < width
    first_ptr += batch * length
    begin, whole, diagonal, end = _key_bounds(first_ptr, block_start, length, KEPT, WALKED)
    first = tl.load(first_ptr + rows, mask=rows_inside, other=0)  # [KEPT]
    tile = ((batch * length + rows)[:, None] * num_heads + head) * width + columns[None, :]
    q_tile = q_ptr + batch * q_batch + head * q_head + rows.to(tl.int64)[:, None] * q_row + columns[None, :]
    q = _load(q_tile, rows_inside, columns_inside, False, ALL_COLUMNS)  # [KEPT, WIDTH]
    dy = _load(dy_ptr + tile, rows_inside, columns_inside, False, ALL_COLUMNS)  # [KEPT, WIDTH]
    y = _load(y_ptr + tile, rows_inside, columns_inside, False, ALL_COLUMNS)  # [KEPT, WIDTH]
    per_row = (batch * num_heads + head) * length + rows
    lse = tl.load(lse_ptr + per_row, mask=rows_inside, other=0.0) * score_scale  # [KEPT]
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)  # [KEPT]
    tl.store(delta_ptr + per_row, delta, mask=rows_inside)  # for the keys' kernel
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    dq = tl.zeros((KEPT, WIDTH), tl.float32)
    dq = _look_back(
        dq, q, dy, k_ptr, v_ptr, k_row, v_row, rows, first, lse, delta, columns, columns_inside, begin, whole, length,
        score_scale, True, ALL_COLUMNS, WALKED,
    )  # fmt: skip
    dq = _look_back(
        dq, q, dy, k_ptr, v_ptr, k_row, v_row, rows, first, lse, delta, columns, columns_inside, whole, diagonal,
        length, score_scale, False, ALL_COLUMNS, WALKED,
    )  # fmt: skip
    dq = _look_back(
        dq, q, dy, k_ptr, v_ptr, k_row, v_row, rows, first, lse, delta, columns, columns_inside, diagonal, end, length,
        score_scale, True, ALL_COLUMNS, WALKED,
    )  # fmt: skip
    inside = rows_inside[:, None] & columns_inside[None, :]
    tl.store(dq_ptr + tile, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _be_looked_at(
    dk, dv, k, v, dy_ptr, q_ptr, lse_ptr, delta_ptr, q_head, q_row, dy_row, head, keys, ends, columns,
    columns_inside, begin, end, again, again_end, length, width, scale,
    BORDER: tl.constexpr, GROUP: tl.constexpr, ALL_COLUMNS: tl.constexpr, KEPT: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of keys and values what queries of all heads do, in two stretches."""
    local = tl.arange(0, WALKED)
    q_tile = local[:, None] * q_row + columns[None, :]  # [WALKED, WIDTH]
    dy_tile = local[:, None] * dy_row + columns[None, :]
    until = tl.cdiv(end - begin, WALKED)
    num_blocks = until + tl.cdiv(again_end - again, WALKED)
    for index in range(0, GROUP * num_blocks):  # one loop, so that loads run ahead from head to head
        member = head + index // num_blocks
        block = index % num_blocks
        start = tl.where(block < until, begin + block * WALKED, again + (block - until) * WALKED)
        rows = start + local
        rows_inside = rows < length
        q_block = q_ptr + member * q_head + start.to(tl.int64) * q_row
        dy_block = dy_ptr + member * width + start.to(tl.int64) * dy_row
        q = _load(q_block + q_tile, rows_inside, columns_inside, not BORDER, ALL_COLUMNS)  # [WALKED, WIDTH]
        dy = _load(dy_block + dy_tile, rows_inside, columns_inside, not BORDER, ALL_COLUMNS)  # [WALKED, WIDTH]
        per_row = member * length + start
        if BORDER:
            lse = tl.load(lse_ptr + per_row + local, mask=rows_inside, other=0.0)  # [WALKED]
            delta = tl.load(delta_ptr + per_row + local, mask=rows_inside, other=0.0)
        else:
            lse = tl.load(lse_ptr + per_row + local)
            delta = tl.load(delta_ptr + per_row + local)
        # sums start at what is subtracted from them, which frees the registers that it would wait in
        start_at = tl.broadcast_to(-lse[None, :], (KEPT, WALKED))
        scores = tl.dot(k, tl.trans(q), start_at, input_precision=PRECISION) * scale  # [KEPT, WALKED]
        if BORDER:
            row = rows[None, :]
            scores = tl.where((row >= keys[:, None]) & (row < ends[:, None]), scores, -float("inf"))
        weights = tl.exp2(scores)
        dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)  # [KEPT, WIDTH]
        start_at = tl.broadcast_to(-delta[None, :], (KEPT, WALKED))
        dscores = weights * tl.dot(v, tl.trans(dy), start_at, input_precision=PRECISION)  # [KEPT, WALKED]
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)  # [KEPT, WIDTH]
    return dk, dv


@triton.jit(do_not_specialize=["length"])
def _backward_keys(
    dy_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, end_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, length, width, scale, score_scale,
    GROUP: tl.constexpr, ALL_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    key_head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_key_heads = tl.num_programs(0)
    num_heads = num_key_heads * GROUP
    block_start = tl.program_id(1) * KEPT  # the longest walks, of the first keys, come first
    keys, columns = block_start + tl.arange(0, KEPT), tl.arange(0, WIDTH)
    keys_inside, columns_inside = keys < length, columns < width
    key = keys.to(tl.int64)[:, None]
    k_tile = k_ptr + batch * k_batch + key_head * k_head + key * k_row + columns[None, :]
    v_tile = v_ptr + batch * v_batch + key_head * v_head + key * v_row + columns[None, :]
    k = _load(k_tile, keys_inside, columns_inside, False, ALL_COLUMNS)  # [KEPT, WIDTH]
    v = _load(v_tile, keys_inside, columns_inside, False, ALL_COLUMNS)  # [KEPT, WIDTH]
    # queries: from the first that looks at a key of the block, those that see them all, and the last document's rest
    end_ptr += batch * length
    begin = block_start // WALKED * WALKED
    ends = tl.load(end_ptr + keys, mask=keys_inside, other=0)  # [KEPT]; nothing looks at what is outside
    end = tl.load(end_ptr + tl.minimum(block_start + KEPT, length) - 1)
    whole = tl.minimum(tl.cdiv(block_start + KEPT - 1, WALKED) * WALKED, end)
    rest = tl.maximum(tl.load(end_ptr + block_start) // WALKED * WALKED, whole)
    dy_row = num_heads * width
    q_ptr += batch * q_batch
    dy_ptr += batch * length * dy_row
    lse_ptr += batch * num_heads * length
    delta_ptr += batch * num_heads * length
    head = key_head * GROUP
    dk = tl.zeros((KEPT, WIDTH), tl.float32)
    dv = tl.zeros((KEPT, WIDTH), tl.float32)
    dk, dv = _be_looked_at(
        dk, dv, k, v, dy_ptr, q_ptr, lse_ptr, delta_ptr, q_head, q_row, dy_row, head, keys, ends, columns,
        columns_inside, begin, whole, rest, end, length, width, score_scale, True, GROUP, ALL_COLUMNS, KEPT, WALKED,
    )  # fmt: skip
    dk, dv = _be_looked_at(
        dk, dv, k, v, dy_ptr, q_ptr, lse_ptr, delta_ptr, q_head, q_row, dy_row, head, keys, ends, columns,
        columns_inside, whole, rest, rest, rest, length, width, score_scale, False, GROUP, ALL_COLUMNS, KEPT, WALKED,
    )  # fmt: skip
    tile = ((batch * length + keys)[:, None] * num_key_heads + key_head) * width + columns[None, :]
    inside = keys_inside[:, None] & columns_inside[None, :]
    tl.store(dk_ptr + tile, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + tile, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def document_attention_fwd(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Means of values [B, H, L, K], and the log of each query's sum of exponentials [B, H, L], in float32 and unscaled.

    Args:
        q: Queries [B, H, L, K]; of these three a row's elements lie together, all else as it may.
        k: Keys [B, G, L, K].
        v: Values [B, G, L, K].
        first: Position of the first token of each token's document, int32 [B, L].
    """
    batch, heads, length, width = q.shape
    q, k, v = whole_rows(q), whole_rows(k), whole_rows(v)
    y = empty_beside(q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    if q.numel():
        launch = _launches(q).forward
        _forward[(heads, triton.cdiv(length, launch.kept), batch)](
            q, k, v, first.contiguous(), y, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], length, width,
            _score_scale(width), **_options(q, k, launch),
        )  # fmt: skip
    return y, lse


def document_attention_bwd(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, first: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, each in its shape and dtype; the same bits on every run.

    Args:
        dy: Gradient of the output [B, H, L, K].
        q: Queries [B, H, L, K].
        k: Keys [B, G, L, K].
        v: Values [B, G, L, K].
        y: Output of the forward pass [B, H, L, K].
        lse: From `document_attention_fwd` [B, H, L].
        first: Position of the first token of each token's document, int32 [B, L].
        end: Position behind its last token, int32 [B, L].
    """
    batch, heads, length, width = q.shape
    q, k, v = whole_rows(q), whole_rows(k), whole_rows(v)
    dy, y = (x.transpose(1, 2).contiguous() for x in (dy, y))  # tokens before heads, as they are where models call
    dq, dk, dv = empty_beside(q), empty_beside(k), empty_beside(v)
    if q.numel():
        delta = torch.empty_like(lse)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        scales = (length, width, width**-0.5, _score_scale(width))
        first, end = first.contiguous(), end.contiguous()
        launch = _launches(q).queries
        _backward_queries[(heads, triton.cdiv(length, launch.kept), batch)](
            dy, q, k, v, y, lse, first, dq, delta, *strides, *scales, **_options(q, k, launch)
        )
        launch = _launches(q).keys
        _backward_keys[(k.shape[1], triton.cdiv(length, launch.kept), batch)](
            dy, q, k, v, lse, delta, end, dk, dv, *strides, *scales, **_options(q, k, launch)
        )
    return dq, dk, dv


def _score_scale(width: int) -> float:
    return math.log2(math.e) / math.sqrt(width)


def _launches(q: Tensor) -> _Launches:
    width = q.shape[3]
    if q.dtype == torch.float32:
        kind = _FLOAT32
    elif width != max(16, triton.next_power_of_2(width)):
        kind = _RAGGED
    else:
        kind = _WIDE if width > 64 else _NARROW
    return constants(_CONSTANTS, q.device)[kind]


def _options(q: Tensor, k: Tensor, launch: _Launch) -> dict[str, int | bool]:
    width = max(16, triton.next_power_of_2(q.shape[3]))
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "ALL_COLUMNS": width == q.shape[3],
        "WIDTH": width,
        "KEPT": launch.kept,
        "WALKED": launch.walked,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
