# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Distillation in the Triton language: what a chunk of scores is compared and differentiated with.

Bound by memory: a program goes over a student's and a teacher's row twice, once for the sums of exponentials and once
for loss and gradient, which it writes over the student's row (three times where the gradient needs the divergence).
Rows of 128,256 scores do not fit into registers; the second reading partly finds them in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy_triton import (
    _IGNORED,
    _LOWEST,
    add_exponential,
    cap_slope,
    capped,
    label_score,
    log_sum,
)
from kernels.launch_constants import constants

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
_FORWARD, _REVERSE, _JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_CONSTANTS = {80: (1024, 4), 90: (2048, 8), 100: (2048, 16)}
"""Columns per step of a program, and its warps: 8 scores of each row a thread, one 16-byte load of bfloat16 each."""


@triton.jit
def _log_mean(log_p, log_q, beta):
    """log(beta p + (1 - beta) q)."""
    a, b = log_p + tl.log(beta), log_q + tl.log(1.0 - beta)
    larger = tl.maximum(a, b)
    return larger + tl.log(1.0 + tl.exp(tl.minimum(a, b) - larger))


@triton.jit
def _times(probability, value):
    """Their product, zero where nothing is expected, whatever the value; NaN stays NaN."""
    return tl.where(probability == 0.0, 0.0, probability * value)


@triton.jit
def _dense(
    student_ptr, teacher_ptr, targets_ptr, losses_ptr, student_stride, teacher_stride, num_columns,
    temperature, alpha, beta, softcap, teacher_softcap,
    KIND: tl.constexpr, MIXED: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_row, teacher_row = student_ptr + row * student_stride, teacher_ptr + row * teacher_stride
    target = tl.load(targets_ptr + row)
    if target == _IGNORED:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for first in range(0, num_columns, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                nothing = tl.zeros((BLOCK,), tl.float32).to(student_ptr.dtype.element_ty)
                tl.store(student_row + columns, nothing, mask=columns < num_columns)
    else:
        colder = 1.0 / temperature
        if MIXED:
            score = label_score(student_row, target, num_columns, softcap, CAPPED)
        largest_q, largest_p = tl.full((BLOCK,), _LOWEST, tl.float32), tl.full((BLOCK,), _LOWEST, tl.float32)
        total_q, total_p = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        largest_1, total_1 = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, num_columns, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < num_columns
            s = tl.load(student_row + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
            t = tl.load(teacher_row + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
            s = tl.where(inside, capped(s, softcap, CAPPED), float("-inf"))
            t = tl.where(inside, capped(t, teacher_softcap, TEACHER_CAPPED), float("-inf"))
            largest_q, total_q = add_exponential(largest_q, total_q, s * colder)
            largest_p, total_p = add_exponential(largest_p, total_p, t * colder)
            if MIXED:
                largest_1, total_1 = add_exponential(largest_1, total_1, s)
        lse_q, lse_p = log_sum(largest_q, total_q), log_sum(largest_p, total_p)
        loss = 0.0
        lse_1 = lse_q
        if MIXED:
            lse_1 = log_sum(largest_1, total_1)
            loss = (1.0 - alpha) * (lse_1 - score)

        apart_p, apart_q = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        if KIND != _FORWARD:  # its gradient needs the divergence first
            for first in range(0, num_columns, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                inside = columns < num_columns
                s = tl.load(student_row + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
                t = tl.load(teacher_row + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
                log_q = capped(s, softcap, CAPPED) * colder - lse_q
                log_p = capped(t, teacher_softcap, TEACHER_CAPPED) * colder - lse_p
                q = tl.where(inside, tl.exp(log_q), 0.0)
                if KIND == _REVERSE:
                    apart_q += _times(q, log_q - log_p)
                else:
                    log_m = _log_mean(log_p, log_q, beta)
                    apart_q += _times(q, log_q - log_m)
                    apart_p += _times(tl.where(inside, tl.exp(log_p), 0.0), log_p - log_m)
        divergence_q = tl.sum(apart_q, 0)
        divergence_p = tl.sum(apart_p, 0)

        if GRADIENT or KIND == _FORWARD:
            for first in range(0, num_columns, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                inside = columns < num_columns
                s = tl.load(student_row + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
                t = tl.load(teacher_row + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
                s = capped(s, softcap, CAPPED)
                log_q = s * colder - lse_q
                log_p = capped(t, teacher_softcap, TEACHER_CAPPED) * colder - lse_p
                q = tl.exp(log_q)
                if KIND == _FORWARD:
                    p = tl.where(inside, tl.exp(log_p), 0.0)
                    apart_p += _times(p, log_p - log_q)
                    gradient = q - p
                elif KIND == _REVERSE:
                    gradient = _times(q, log_q - log_p - divergence_q)
                else:
                    gradient = (1.0 - beta) * _times(q, log_q - _log_mean(log_p, log_q, beta) - divergence_q)
                if GRADIENT:
                    gradient *= alpha * temperature
                    if MIXED:
                        gradient += (1.0 - alpha) * (tl.exp(s - lse_1) - tl.where(columns == target, 1.0, 0.0))
                    gradient *= cap_slope(s, softcap, CAPPED)
                    tl.store(student_row + columns, gradient.to(student_ptr.dtype.element_ty), mask=inside)
        if KIND == _FORWARD:
            divergence = tl.sum(apart_p, 0)
        elif KIND == _REVERSE:
            divergence = divergence_q
        else:
            divergence = beta * divergence_p + (1.0 - beta) * divergence_q
        tl.store(losses_ptr + row, loss + alpha * temperature * temperature * divergence)


@triton.jit
def _log_sum_of(values):
    """Logarithm of the sum of exponentials of a block; minus infinity for nothing but that."""
    largest = tl.maximum(tl.max(values, 0), _LOWEST)
    return largest + tl.log(tl.sum(tl.exp(values - largest), 0))


@triton.jit
def _log_sum_of_two(a, b):
    larger = tl.maximum(tl.maximum(a, b), _LOWEST)
    return larger + tl.log(tl.exp(a - larger) + tl.exp(b - larger))


@triton.jit
def _cached(
    student_ptr, indices_ptr, log_probs_ptr, tail_ptr, targets_ptr, losses_ptr, student_stride, num_columns, num_kept,
    temperature, alpha, beta, softcap,
    KIND: tl.constexpr, MIXED: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row * student_stride
    target = tl.load(targets_ptr + row)
    if target == _IGNORED:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for first in range(0, num_columns, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                nothing = tl.zeros((BLOCK,), tl.float32).to(student_ptr.dtype.element_ty)
                tl.store(student_row + columns, nothing, mask=columns < num_columns)
    else:
        colder = 1.0 / temperature
        slots = tl.arange(0, KEPT)
        filled = slots < num_kept
        index = tl.load(indices_ptr + row * num_kept + slots, mask=filled, other=0)  # [KEPT]
        log_p = tl.load(log_probs_ptr + row * num_kept + slots, mask=filled, other=float("-inf")).to(tl.float32)
        log_p_tail = tl.load(tail_ptr + row).to(tl.float32)
        kept = tl.load(student_row + index, mask=filled, other=0.0).to(tl.float32)  # [KEPT]
        kept = tl.where(filled, capped(kept, softcap, CAPPED), float("-inf"))
        if MIXED:
            score = label_score(student_row, target, num_columns, softcap, CAPPED)
        # What is kept leaves the row: the tail's mass is summed up, as one minus the rest would be rounded away.
        gone = tl.full((KEPT,), float("-inf"), tl.float32).to(student_ptr.dtype.element_ty)
        tl.debug_barrier()  # the label has been read
        tl.store(student_row + index, gone, mask=filled)
        tl.debug_barrier()

        largest_q, total_q = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
        largest_1, total_1 = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, num_columns, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            raw = tl.load(student_row + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
            s = tl.where(raw == float("-inf"), raw, capped(raw, softcap, CAPPED))  # [BLOCK]
            largest_q, total_q = add_exponential(largest_q, total_q, s * colder)
            if MIXED:
                largest_1, total_1 = add_exponential(largest_1, total_1, s)
        lse_tail = log_sum(largest_q, total_q)
        lse_q = _log_sum_of_two(lse_tail, _log_sum_of(kept * colder))
        loss = 0.0
        lse_1 = lse_q
        if MIXED:
            lse_1 = _log_sum_of_two(log_sum(largest_1, total_1), _log_sum_of(kept))
            loss = (1.0 - alpha) * (lse_1 - score)

        log_q, log_q_tail = kept * colder - lse_q, lse_tail - lse_q
        p, p_tail = tl.exp(log_p), tl.exp(log_p_tail)  # nothing where no token is kept
        q, q_tail = tl.exp(log_q), tl.exp(log_q_tail)
        # slope: q times the derivative of the divergence; see `kernels.loss_rows`
        if KIND == _FORWARD:
            divergence = tl.sum(_times(p, log_p - log_q), 0) + _times(p_tail, log_p_tail - log_q_tail)
            slope, slope_tail = -p, -p_tail
        elif KIND == _REVERSE:
            slope, slope_tail = _times(q, log_q - log_p), _times(q_tail, log_q_tail - log_p_tail)
            divergence = tl.sum(slope, 0) + slope_tail
        else:
            log_m, log_m_tail = _log_mean(log_p, log_q, beta), _log_mean(log_p_tail, log_q_tail, beta)
            slope = (1.0 - beta) * _times(q, log_q - log_m)
            slope_tail = (1.0 - beta) * _times(q_tail, log_q_tail - log_m_tail)
            theirs = tl.sum(_times(p, log_p - log_m), 0) + _times(p_tail, log_p_tail - log_m_tail)
            divergence = beta * theirs + tl.sum(slope, 0) + slope_tail
        tl.store(losses_ptr + row, loss + alpha * temperature * temperature * divergence)

        if GRADIENT:
            total = tl.sum(slope, 0) + slope_tail
            for first in range(0, num_columns, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                inside = columns < num_columns
                s = tl.load(student_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
                s = capped(s, softcap, CAPPED)  # [BLOCK]
                # the student's own probabilities share out what pulls at the tail
                gradient = tl.exp(s * colder - lse_tail) * slope_tail - tl.exp(s * colder - lse_q) * total
                gradient *= alpha * temperature
                if MIXED:
                    gradient += (1.0 - alpha) * (tl.exp(s - lse_1) - tl.where(columns == target, 1.0, 0.0))
                gradient *= cap_slope(s, softcap, CAPPED)
                tl.store(student_row + columns, gradient.to(student_ptr.dtype.element_ty), mask=inside)
            gradient = (slope - q * total) * (alpha * temperature)
            if MIXED:
                gradient += (1.0 - alpha) * (tl.exp(kept - lse_1) - tl.where(index == target, 1.0, 0.0))
            gradient *= cap_slope(kept, softcap, CAPPED)
            tl.debug_barrier()  # what was written where a token is kept is written over
            tl.store(student_row + index, gradient.to(student_ptr.dtype.element_ty), mask=filled)


def against_logits(
    student: Tensor,
    targets: Tensor,
    teacher: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    softcap: float,
    teacher_softcap: float,
    with_gradient: bool,
) -> Tensor:
    """Losses [C] in float32; the gradient of the student's scores is written over them if wanted.

    Args:
        student: Scores [C, V], each row's side by side.
        targets: Labels [C], int64, contiguous.
        teacher: The teacher's scores [C, V], likewise.
        divergence: A key of `KINDS`; for the rest see `kernels.linear_distillation`.
        beta: Weight of the teacher in the mean distribution.
        temperature: Divides both sets of scores.
        alpha: Weight of the divergence.
        softcap: Of the student; 0 = none.
        teacher_softcap: Of the teacher; 0 = none.
        with_gradient: Whether to write the gradient.
    """
    num_rows, num_columns = student.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=student.device)
    if num_rows:
        block, warps = _launch(num_columns, student)
        _dense[(num_rows,)](
            student, teacher, targets, losses, student.stride(0), teacher.stride(0), num_columns,
            temperature, alpha, beta, softcap, teacher_softcap,
            KIND=KINDS[divergence], MIXED=alpha < 1, CAPPED=softcap != 0, TEACHER_CAPPED=teacher_softcap != 0,
            GRADIENT=with_gradient, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return losses


def against_cache(
    student: Tensor,
    targets: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail_log_mass: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    softcap: float,
    with_gradient: bool,
) -> Tensor:
    """Losses [C] in float32; the student's scores are overwritten, by their gradient if that is wanted.

    Args:
        student: Scores [C, V], each row's side by side.
        targets: Labels [C], int64, contiguous.
        indices: Tokens whose probabilities are known [C, K], contiguous.
        log_probs: Logarithms of their probabilities [C, K], contiguous.
        tail_log_mass: Logarithm of the probability of all others together [C], contiguous.
        divergence: A key of `KINDS`; for the rest see `kernels.linear_distillation`.
        beta: Weight of the teacher in the mean distribution.
        temperature: Divides the student's scores.
        alpha: Weight of the divergence.
        softcap: Of the student; 0 = none.
        with_gradient: Whether to write the gradient.
    """
    num_rows, num_columns = student.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=student.device)
    if num_rows:
        block, warps = _launch(num_columns, student)
        _cached[(num_rows,)](
            student, indices, log_probs, tail_log_mass, targets, losses, student.stride(0), num_columns,
            indices.shape[1], temperature, alpha, beta, softcap,
            KIND=KINDS[divergence], MIXED=alpha < 1, CAPPED=softcap != 0, GRADIENT=with_gradient,
            KEPT=triton.next_power_of_2(indices.shape[1]), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return losses


def _launch(num_columns: int, scores: Tensor) -> tuple[int, int]:
    block, warps = constants(_CONSTANTS, scores.device)
    return min(block, triton.next_power_of_2(num_columns)), warps
