"""The cross-entropy kernels on given scores against float64: on CUDA, or interpreted on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cross_entropy import cross_entropy
from kernels.dispatch import INTERPRETED, KernelError
from kernels.testing import apart, assert_close_to_truth, padded, turned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 64), (2, 3, 100), (2, 2500)]  # more columns than a program takes at once
ALL_KNOBS = {"softcap": 3.0, "z_loss": 0.01, "label_smoothing": 0.1}
if not INTERPRETED:
    SHAPES += [(1000, 50257), (70, 128256)]


class Case(NamedTuple):
    logits: Tensor
    targets: Tensor


def made(shape: tuple[int, ...], dtype: torch.dtype, device: str, vocab: int | None = None) -> Case:
    generator = torch.Generator().manual_seed(sum(shape))
    targets = torch.randint(vocab or shape[-1], shape[:-1], generator=generator)
    targets.view(-1)[1::3] = reference.IGNORED
    return Case((3 * torch.randn(shape, generator=generator)).to(device, dtype), targets.to(device))


def run(case: Case, **knobs: Any) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the scores, of a third of the loss."""
    logits = case.logits.detach().requires_grad_()
    loss = cross_entropy(logits, case.targets, **knobs)
    return loss.detach(), torch.autograd.grad(loss / 3, logits)[0]


def check(case: Case, **knobs: Any) -> None:
    wide = Case(case.logits.double(), case.targets)
    truth, plain = (run(each, **knobs, kernels="reference") for each in (wide, case))
    counts = case.targets != reference.IGNORED
    sizes = wide.logits.abs().amax(-1) + 1 + torch.tensor(case.logits.shape[-1]).log()
    terms = (sizes.square() * counts).sum(), torch.ones_like(truth[1])
    for actual, achieved, exact, magnitude in zip(
        run(case, **knobs, kernels="triton"), plain, truth, terms, strict=True
    ):
        assert_close_to_truth(actual, achieved, exact, magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(made(shape, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("knobs", [*({name: value} for name, value in ALL_KNOBS.items()), ALL_KNOBS], ids="-".join)
def test_variants(knobs: dict[str, float], dtype: torch.dtype, device: str) -> None:
    check(made((4, 70), dtype, device), **knobs)
    check(made((4, 70), dtype, device, vocab=61), vocab_size=61, **knobs)


def test_padding_changes_nothing_and_gets_no_gradient(device: str) -> None:
    case = made((4, 70), torch.float32, device, vocab=61)
    poisoned = Case(case.logits.index_fill(1, torch.arange(61, 70, device=device), torch.nan), case.targets)
    loss, gradient = run(poisoned, vocab_size=61, kernels="triton")
    expected, inner = run(Case(case.logits[:, :61].contiguous(), case.targets), kernels="triton")
    assert loss == expected
    assert torch.equal(gradient[:, :61], inner)
    assert not gradient[:, 61:].any()


@pytest.mark.parametrize("overwrite", [False, True])
def test_strided_scores(overwrite: bool, device: str) -> None:
    case = made((4, 40), torch.float32, device)
    expected = run(case, kernels="triton")
    for logits in (apart(case.logits), padded(case.logits), turned(case.logits)):
        assert not logits.is_contiguous()
        results = run(Case(logits, case.targets), kernels="triton", overwrite=overwrite)
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_the_gradient_may_be_written_over_the_scores(device: str) -> None:
    case = made((4, 40), torch.bfloat16, device)
    expected, kept = run(case, kernels="triton"), case.logits.clone()
    logits = kept.clone()
    given = logits.requires_grad_().view(2, 2, 40)  # not a leaf
    loss = cross_entropy(given, case.targets.view(2, 2), overwrite=True, kernels="triton")
    saved = given.sigmoid()  # saves its own result only: nothing of the scores
    (gradient,) = torch.autograd.grad(loss / 3, logits)
    assert torch.equal(gradient, expected[1])
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(saved.detach(), kept.view(2, 2, 40).sigmoid())


def test_scores_that_somebody_saved_are_not_overwritten_in_silence(device: str) -> None:
    case = made((4, 40), torch.float32, device)
    logits = case.logits.requires_grad_() * 1
    total = logits.square().sum()
    loss = total + cross_entropy(logits, case.targets, overwrite=True, kernels="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_extreme_scores(device: str) -> None:
    case = made((3, 40), torch.float32, device)
    case.logits[0] *= 1e4
    case.logits[2, 7] = -torch.inf  # a token that is forbidden
    assert case.targets[2] != 7
    check(case)
    case.logits[0, 3] = torch.nan
    loss, _ = run(case, kernels="triton")
    assert loss.isnan()


def test_a_label_outside_of_the_vocabulary_makes_the_loss_nan(device: str) -> None:
    case = made((3, 40), torch.float32, device, vocab=30)
    case.targets[0] = 30
    assert run(case, vocab_size=30, kernels="triton")[0].isnan()
    case.targets[0] = -7
    assert run(case, vocab_size=30, kernels="triton")[0].isnan()


def test_no_rows(device: str) -> None:
    loss, gradient = run(made((0, 8), torch.float32, device), kernels="triton")
    assert (loss, gradient.shape) == (0, (0, 8))


def test_the_same_bits_on_every_run_and_in_any_order(device: str) -> None:
    case = made((5, 100), torch.float32, device)
    turned = Case(case.logits.flip(0), case.targets.flip(0))
    first = run(case, kernels="triton")
    assert all(torch.equal(one, other) for one, other in zip(first, run(case, kernels="triton"), strict=True))
    assert torch.equal(run(turned, kernels="triton")[1], first[1].flip(0))


def test_registration(device: str) -> None:
    case, knobs = made((3, 24), torch.bfloat16, device), (20, 3.0, 0.01, 0.1)
    case.targets[0] = 5
    losses, lse = torch.ops.millrace.cross_entropy_fwd(*case, *knobs)
    torch.library.opcheck(torch.ops.millrace.cross_entropy_fwd.default, (*case, *knobs))
    arguments = (*case, lse, losses.sum(), *knobs)
    torch.library.opcheck(torch.ops.millrace.cross_entropy_bwd.default, arguments)
    torch.library.opcheck(torch.ops.millrace.cross_entropy_bwd_.default, arguments)


@pytest.mark.parametrize("overwrite", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_compiled(overwrite: bool, device: str) -> None:
    case = made((3, 24), torch.float32, device)

    def both(logits: Tensor) -> Tensor:
        return cross_entropy(logits * 1, case.targets, overwrite=overwrite, kernels="triton")

    results = []
    for function in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        logits = case.logits.clone().requires_grad_()
        loss = function(logits)
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_cannot_be_is_refused(device: str) -> None:
    case = made((3, 24), torch.float32, device)
    with pytest.raises(KernelError, match=r"not torch\.float64"):
        run(Case(case.logits.double(), case.targets), kernels="triton")
    with pytest.raises(ValueError, match=r"targets have shape \[2\]; logits of shape \[3, 24\] need one each"):
        run(Case(case.logits, case.targets[:2]))
    with pytest.raises(ValueError, match="vocab_size=25 must be between 1 and the 24 columns"):
        run(case, vocab_size=25)
