"""What each operation computes, in plain torch: the truth for tests, the CPU path, the form that is exported."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from torch.optim.adamw import adamw as _torch_adamw

from kernels.int4_layout import SYMMETRIC_ZERO, unpack


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows of `x` scaled to a root mean square of one, then by `weight` (arXiv:1910.07467).

    Computes in float32, or in float64 for float64 inputs, and rounds once, at the end.

    Args:
        x: Activations [..., D].
        weight: Scale of each column [D].
        eps: Added to the mean square before its root.

    Returns:
        Normalized activations [..., D] in the dtype of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)


def gradient_squares(gradients: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements [], float64; not finite where an element is not."""
    return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()


def adamw(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    squares: Tensor | None = None,
    max_norm: float = 0.0,
    loss_scale: float = 1.0,
    copies: Sequence[Tensor] = (),
) -> None:
    """One update in place by torch's own fused AdamW, after what `kernels.adamw.adamw` does to gradients before it."""
    # torch's own goes through memory in the weights' order, whatever the gradients' strides
    gradients = [
        gradient
        if gradient.dtype == weight.dtype and gradient.stride() == weight.stride()
        else torch.empty_like(weight).copy_(gradient)
        for gradient, weight in zip(gradients, weights, strict=True)
    ]
    scale, not_finite = 1 / loss_scale, None
    if squares is not None:
        not_finite = 1 - squares.isfinite().float()
        clipped = max_norm / (squares.sqrt() * scale + 1e-6) if max_norm else torch.ones_like(squares)
        factor = (scale * clipped.clamp(max=1)).to(weights[0].dtype)
        gradients = [gradient * factor for gradient in gradients]
    elif scale != 1:
        gradients = [gradient * scale for gradient in gradients]
    _torch_adamw(
        list(weights), gradients, list(exp_avgs), list(exp_avg_sqs), [], list(steps), fused=True, found_inf=not_finite,
        beta1=betas[0], beta2=betas[1], lr=learning_rate, weight_decay=weight_decay, eps=eps, amsgrad=False,
        maximize=False,
    )  # fmt: skip
    for copy, weight in zip(copies, weights, strict=bool(copies)):
        copy.copy_(weight)


INT8, FP8 = torch.int8, torch.float8_e4m3fn
LARGEST_CODE = {INT8: 127.0, FP8: 448.0}
"""int8: -128 stays unused, so that codes are symmetric; E4M3: its largest number (arXiv:2209.05433)."""
SMALLEST_MAGNITUDE = 1e-30
"""Rows and groups that are closer to zero count as zero: their scale must not be zero, nor its inverse infinite."""


def quantize_groups(x: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of the rows of `x` and the scale of each group of columns; see `kernels.quantize`.

    Args:
        x: Numbers [..., K].
        group_size: Columns of a group, G.
        dtype: `INT8` or `FP8`.

    Returns:
        Codes [..., K] and scales [..., K / G].
    """
    groups = torch.unflatten(x, -1, (x.shape[-1] // group_size, group_size))
    wide = groups.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_MAGNITUDE)
    limit = torch.full_like(largest, LARGEST_CODE[dtype])  # dividing by a number, torch multiplies with its inverse
    steps = wide * (limit / largest)
    codes = (steps.round() if dtype == INT8 else steps).clamp(-LARGEST_CODE[dtype], LARGEST_CODE[dtype]).to(dtype)
    return codes.flatten(-2), (largest / limit).squeeze(-1)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes stand for.

    Args:
        codes: int8 or E4M3 [..., K].
        scales: Scale of each group of columns [..., K / G].
        dtype: Of the result.

    Returns:
        Numbers [..., K].
    """
    groups = torch.unflatten(codes, -1, (scales.shape[-1], codes.shape[-1] // scales.shape[-1]))
    return (groups.to(scales.dtype) * scales[..., None]).flatten(-2).to(dtype)


def w8a8_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Scaled products of 8-bit codes; see `kernels.w8a8_linear`.

    Args:
        x: int8 or E4M3 [..., K].
        weight: Of the same kind [N, K].
        x_scale: Scale of each row [..., 1]; float64 scales make everything so.
        weight_scale: Scale of each channel [N].
        bias: [N].
        dtype: Of the result [..., N].
    """
    wide = torch.promote_types(x_scale.dtype, torch.float32)
    if x.dtype == INT8:
        sums = int8_product(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0]).to(wide)
    else:
        sums = x.to(wide) @ weight.to(wide).t()
    y = sums * weight_scale.to(wide) * x_scale
    return (y if bias is None else y + bias).to(dtype)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """`a` [M, K] times the transpose of `b` [N, K], both int8, as exact int32 sums [M, N].

    On CUDA torch's integer kernel takes more than 16 rows and multiples of 8 only; float64, whose sums of such products
    are exact up to 2^53, does the rest.
    """
    (rows, columns), channels = a.shape, b.shape[0]
    if a.is_cuda and (rows <= 16 or columns % 8 or channels % 8):
        return (a.double() @ b.double().t()).to(torch.int32)
    return torch._int_mm(a, b.t())


def w4a16_linear(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """Linear layer of 4-bit weights; see `kernels.w4a16_linear`.

    Args:
        x: Activations [..., K].
        packed: Codes in the layout of `kernels.int4_layout`, int16.
        scales: Scale of each group of columns and channel [K / G, N].
        zeros: Code that stands for zero, uint8 [K / G, N]; None = 8.
        bias: [N].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    group_size = x.shape[-1] // scales.shape[0]
    codes = torch.unflatten(unpack(packed, x.shape[-1]), 1, (-1, group_size)).to(wide)  # [N, K / G, G]
    centred = codes - (SYMMETRIC_ZERO if zeros is None else zeros.t().to(wide)[..., None])
    weight = (centred * scales.t().to(wide)[..., None]).flatten(1)
    y = x.to(wide) @ weight.t()
    return (y if bias is None else y + bias).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum; both [..., D]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Rows of `x` [..., D] with mean zero and variance one, times `weight` [D] plus `bias` [D] (arXiv:1607.06450).

    Computes in float32, or in float64 for float64 inputs, and rounds once, at the end.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    shift = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), shift, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of x + residual, and that sum; both [..., D]."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up [..., F] (arXiv:2002.05202), rounded in between, so that what is saved stays narrow."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """gelu(gate) * up [..., F] (arXiv:2002.05202), exact for `none`, by tanh for `tanh`; rounded in between."""
    return F.gelu(gate, approximate=approximate) * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair (x[i], x[i + K/2]) of q [B, H, L, K] and k [B, G, L, K] turned by an angle (arXiv:2104.09864).

    Args:
        q: Queries.
        k: Keys.
        cos: Cosines of the angles [B or 1, 1, L, K], those of the first half again in the second; rounded to the dtype
            of `q`, as is usual.
        sin: Their sines.
    """
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def document_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
    """Means of the values of each token's document up to itself, weighted by softmax(q k / sqrt(K)).

    Args:
        q: Queries [B, H, L, K].
        k: Keys [B, G, L, K].
        v: Values [B, G, L, K].
        first: Position of the first token of each token's document [B, L].

    Returns:
        [B, H, L, K] in the dtype of `q`.
    """
    order = torch.arange(q.shape[2], device=q.device)
    allowed = (order <= order[:, None]) & (order >= first[:, :, None])  # [B, L, L]
    return scaled_dot_product_attention(q, k, v, allowed[:, None], enable_gqa=q.shape[1] != k.shape[1])


def paged_decode_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """Means of each sequence's cached values, weighted by softmax(q k / sqrt(K)), for one query per sequence and head.

    Args:
        q: Queries of the newest token [S, H, K].
        k_pages: Cached keys [P, page size, G, K].
        v_pages: Cached values [P, page size, G, K].
        page_table: Numbers of each sequence's pages [S, M].
        lengths: Tokens of each sequence in the cache [S].

    Returns:
        [S, H, K] in the dtype of `q`; zeros for an empty sequence.
    """
    page, key_heads = k_pages.shape[1:3]
    token = torch.arange(page_table.shape[1] * page, device=q.device)
    cached = token < lengths[:, None]  # [S, T]
    places = page_table[:, token // page].where(cached, 0).long(), (token % page).expand_as(cached)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (pages[places].to(wide).where(cached[..., None, None], 0) for pages in (k_pages, v_pages))  # [S, T, G, K]
    grouped = q.to(wide).reshape(len(q), key_heads, -1, q.shape[2])
    scores = torch.einsum("sgmk,stgk->sgmt", grouped, k) * q.shape[2] ** -0.5
    weights = scores.masked_fill(~cached[:, None, None], -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("sgmt,stgk->sgmk", weights, v).flatten(1, 2).to(q.dtype)


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, step: Tensor
) -> Tensor:
    """A token for each request, int64 [S]: the draw of `kernels.sample_tokens`, which has the rules and the arguments.

    The same integers in the same steps, so that a draw differs only where an exponential is rounded otherwise and the
    target lies within that rounding.
    """
    scores = logits.float()
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    best, token = scores.max(1, keepdim=True).values, scores.argmax(1)
    draws = (temperature > 0) & best[:, 0].isfinite()
    scale = torch.full_like(best[:, 0], math.log2(math.e)) / temperature.float()
    power = (scores - best) * scale[:, None]
    weights = torch.where((power > -41) & draws[:, None], power.exp2() * 2.0**40, 0).long()  # [S, V]
    last = torch.where(top_k > 0, top_k, scores.shape[1]).clamp(max=scores.shape[1]).long() - 1
    kth = scores.sort(1, descending=True).values.gather(1, last[:, None])
    weights = weights.where(scores >= kth, 0)
    needed = _share(weights.sum(1), (top_p.float().clamp(max=1) * 2.0**31).long().clamp(min=1))
    stream = _mixed(_mixed(seed.long()) + step.long())
    while draws.any():
        stream = _mixed(stream)
        below = weights.cumsum(1)
        target = _share(below[:, -1], stream >> 33 & 0x7FFFFFFF)
        drawn = (below <= target[:, None]).sum(1).clamp(max=scores.shape[1] - 1)
        token = drawn.where(draws, token)
        weights = weights.where(scores > scores.gather(1, token[:, None]), 0)
        draws = draws & (weights.sum(1) >= needed)
    return token


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) in int64, whose shifts would drag the sign along."""
    bits = bits - 0x61C8864680B583EB
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31 & (1 << 33) - 1)


def _share(mass: Tensor, numerator: Tensor) -> Tensor:
    """Rounded down, mass * numerator / 2^31, of a mass below 2^62."""
    return (mass >> 31) * numerator + ((mass & 0x7FFFFFFF) * numerator >> 31)
