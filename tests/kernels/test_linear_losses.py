"""Losses fused with the output projection, their kernels against float64: on CUDA, or interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import INTERPRETED, KernelError
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_distillation import DIVERGENCES, CachedTeacher, TeacherHead, linear_distillation
from kernels.testing import assert_close_to_truth, turned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCAB, PADDED, WIDTH, TEACHER_WIDTH, KEPT = 67, 72, 20, 9, 5
if not INTERPRETED:
    VOCAB, PADDED, WIDTH, TEACHER_WIDTH, KEPT = 5003, 5056, 256, 128, 33


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    targets: Tensor
    teacher_x: Tensor
    teacher_weight: Tensor
    indices: Tensor
    log_probs: Tensor
    tail: Tensor


Loss = Callable[..., Tensor]


def made(tokens: int, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    targets[1::3] = reference.IGNORED
    log_p = (2 * normal(tokens, VOCAB)).log_softmax(-1)
    log_probs, indices = log_p.topk(KEPT)
    tail = log_p.scatter(1, indices, -torch.inf).logsumexp(-1)
    targets[:1] = indices[:1, 0]  # a label among those that are kept
    weights = [2 * normal(PADDED, width) / width**0.5 for width in (WIDTH, TEACHER_WIDTH)]
    floats = normal(tokens, WIDTH), weights[0], normal(tokens, TEACHER_WIDTH), weights[1], log_probs, tail
    x, weight, teacher_x, teacher_weight, log_probs, tail = (each.to(device, dtype) for each in floats)
    return Case(x, weight, targets.to(device), teacher_x, teacher_weight, indices.to(device), log_probs, tail)


def widened(case: Case) -> Case:
    return Case(*(each.double() if each.is_floating_point() else each for each in case))


def fused_cross_entropy(case: Case, kernels: str = "triton", **knobs: Any) -> Tensor:
    return linear_cross_entropy(*case[:3], vocab_size=VOCAB, kernels=kernels, **knobs)


def whole_cross_entropy(case: Case, **knobs: Any) -> Tensor:
    return reference.cross_entropy(case.x @ case.weight.T, case.targets, VOCAB, **knobs).sum()


def fused_dense(case: Case, kernels: str = "triton", teacher_softcap: float = 0.0, **knobs: Any) -> Tensor:
    teacher = TeacherHead(case.teacher_x, case.teacher_weight, teacher_softcap)
    return linear_distillation(*case[:3], teacher, vocab_size=VOCAB, kernels=kernels, **knobs)


def whole_dense(case: Case, **knobs: Any) -> Tensor:
    logits, theirs = case.x @ case.weight.T, case.teacher_x @ case.teacher_weight.T
    return reference.distillation(logits, case.targets, theirs, vocab_size=VOCAB, **knobs).sum()


def fused_cached(case: Case, kernels: str = "triton", **knobs: Any) -> Tensor:
    return linear_distillation(*case[:3], CachedTeacher(*case[5:]), vocab_size=VOCAB, kernels=kernels, **knobs)


def whole_cached(case: Case, **knobs: Any) -> Tensor:
    logits = case.x @ case.weight.T
    return reference.cached_distillation(logits, case.targets, *case[5:], vocab_size=VOCAB, **knobs).sum()


PAIRS = {
    "cross-entropy": (fused_cross_entropy, whole_cross_entropy),
    "dense": (fused_dense, whole_dense),
    "cached": (fused_cached, whole_cached),
}


def run(loss: Loss, case: Case, **knobs: Any) -> list[Tensor]:
    """The loss, and of a third of it the gradients of hidden states and projection."""
    case = case._replace(x=case.x.detach().requires_grad_(), weight=case.weight.detach().requires_grad_())
    total = loss(case, **knobs)
    return [total.detach(), *torch.autograd.grad(total / 3, (case.x, case.weight))]


def check(pair: tuple[Loss, Loss], case: Case, **knobs: Any) -> None:
    tokens_at_once = {"tokens_at_once": 4} if len(case.x) > 4 else {}
    actual = run(pair[0], case, **tokens_at_once, **knobs)
    plain, truth = run(pair[1], case, **knobs), run(pair[1], widened(case), **knobs)
    wide = widened(case)
    scores, slopes = 10 * len(case.x), torch.ones(len(case.x), len(case.weight), device=case.x.device).double() / 10
    terms = [torch.tensor(float(scores)), slopes @ wide.weight.abs(), slopes.T @ wide.x.abs()]
    for got, achieved, exact, magnitude in zip(actual, plain, truth, terms, strict=True):
        assert_close_to_truth(got, achieved, exact, magnitude.to(exact.device))


def knobs_of(name: str) -> list[dict[str, Any]]:
    if name == "cross-entropy":
        return [{}, {"softcap": 3.0, "z_loss": 0.01, "label_smoothing": 0.1}]
    capped = {"softcap": 3.0} | ({"teacher_softcap": 2.0} if name == "dense" else {})
    return [
        {"divergence": kind, "beta": 0.3, **rest}
        for kind in DIVERGENCES
        for rest in ({}, {"temperature": 2.0, "alpha": 0.6, **capped})
    ]


VARIANTS = [
    pytest.param(name, knobs, id=f"{name}-{number}") for name in PAIRS for number, knobs in enumerate(knobs_of(name))
]


@pytest.mark.parametrize(("name", "knobs"), VARIANTS)
def test_loss_and_gradients(name: str, knobs: dict[str, Any], device: str) -> None:
    check(PAIRS[name], made(6, torch.float32, device), **knobs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "knobs"),
    [(name, {}) for name in PAIRS] + [("dense", {"divergence": "jsd"}), ("cached", {"divergence": "reverse_kl"})],
)
def test_narrow_types(name: str, knobs: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    check(PAIRS[name], made(6, dtype, device), **knobs)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(name: str, tokens: int, device: str) -> None:
    check(PAIRS[name], made(tokens, torch.float32, device))


@pytest.mark.parametrize("name", PAIRS)
def test_chunks_order_and_padding_change_nothing(name: str, device: str) -> None:
    loss = PAIRS[name][0]
    case = made(6, torch.float32, device)
    expected = run(loss, case, tokens_at_once=6)
    for at_once in (1, 4):
        for one, other in zip(run(loss, case, tokens_at_once=at_once), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    per_token = (0, 2, 3, 5, 6, 7)
    turned = Case(*(each.flip(0) if number in per_token else each for number, each in enumerate(case)))
    _, dx, dweight = run(loss, turned, tokens_at_once=6)
    torch.testing.assert_close(dx.flip(0), expected[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(dweight, expected[2], rtol=0, atol=1e-6)
    poisoned = case._replace(weight=case.weight.index_fill(0, torch.arange(VOCAB, PADDED, device=device), torch.nan))
    again = run(loss, poisoned, tokens_at_once=6)  # also: the same bits
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    assert not again[2][VOCAB:].any()


@pytest.mark.parametrize("name", PAIRS)
def test_strided_inputs(name: str, device: str) -> None:
    case = made(6, torch.float32, device)
    strided = [turned(each) for each in case]
    assert not any(each.is_contiguous() for each in strided)
    results = zip(run(PAIRS[name][0], Case(*strided)), run(PAIRS[name][0], case), strict=True)
    for one, other in results:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_without_gradient_the_loss_is_the_same(name: str, device: str) -> None:
    case = made(4, torch.float32, device)
    assert PAIRS[name][0](case) == run(PAIRS[name][0], case)[0]


def test_only_wanted_gradients_are_computed(device: str) -> None:
    case = made(5, torch.float32, device)
    _, dx, dweight = run(fused_dense, case)
    for name, whole in (("x", dx), ("weight", dweight)):
        wanted = getattr(case, name).clone().requires_grad_()
        (alone,) = torch.autograd.grad(fused_dense(case._replace(**{name: wanted})) / 3, wanted)
        assert torch.equal(alone, whole)


def test_gradients_can_be_had_once(device: str) -> None:
    case = made(3, torch.float32, device)
    weight = case.weight.clone().requires_grad_()
    loss = fused_cross_entropy(case._replace(weight=weight))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_registration(device: str) -> None:
    case = made(3, torch.bfloat16, device)
    ops, dense = torch.ops.millrace, (case.teacher_x, case.teacher_weight, 0.0)
    torch.library.opcheck(ops.linear_cross_entropy_fwd.default, (*case[:3], VOCAB, 3.0, 0.0, 0.0, 2, True, True, True))
    knobs = ("jsd", 0.3, 2.0, 0.5, VOCAB, 0.0, 2, True, False, True)
    torch.library.opcheck(ops.linear_distillation_fwd.default, (*case[:3], *dense, *knobs))
    torch.library.opcheck(ops.linear_cached_distillation_fwd.default, (*case[:3], *case[5:], *knobs))


@pytest.mark.parametrize(
    "name", ["cached", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("cross-entropy", "dense"))]
)
def test_compiled(name: str, device: str) -> None:
    case = made(3, torch.bfloat16, device)
    compiled = torch.compile(partial(PAIRS[name][0], tokens_at_once=2), backend="aot_eager", fullgraph=True)
    expected = run(PAIRS[name][0], case, tokens_at_once=2)
    assert all(torch.equal(one, other) for one, other in zip(run(compiled, case), expected, strict=True))


def test_what_cannot_be_is_refused(device: str) -> None:
    case = made(3, torch.float32, device)
    with pytest.raises(KernelError, match=r"not torch\.float64"):
        fused_cross_entropy(widened(case))
    with pytest.raises(ValueError, match=r"weight is \[\d+, \d+\] torch.float32; x is \[3, \d+\] torch.float16 and"):
        fused_cross_entropy(case._replace(x=case.x.half()))
    with pytest.raises(ValueError, match="divergence='kl' must be one of forward_kl, reverse_kl, jsd"):
        fused_dense(case, divergence="kl")
    with pytest.raises(ValueError, match=r"beta=1\.0 must be between 0 and 1"):
        fused_dense(case, divergence="jsd", beta=1.0)
    with pytest.raises(ValueError, match=r"the teacher has tokens of shape \[2\], the student of \[3\]"):
        fused_dense(case._replace(teacher_x=case.teacher_x[:2]))
    kept = torch.zeros(3, 1025, device=device)
    with pytest.raises(KernelError, match="kernels hold up to 1024 tokens of a cached teacher in registers, not 1025"):
        fused_cached(case._replace(indices=kept.long(), log_probs=kept))
