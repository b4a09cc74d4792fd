"""What losses are computed with on a CPU: against formulas written out, and the gradients against autograd."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import head_chunks, reference
from kernels.chunk_sizes import CROSS_ENTROPY_SHARE, gpu_tokens
from kernels.cross_entropy import cross_entropy
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_distillation import DIVERGENCES, CachedTeacher, TeacherHead, linear_distillation
from kernels.loss_rows import cached_distillation_rows, cross_entropy_rows, distillation_rows

TOKENS, VOCAB, WIDTH, KEPT = 7, 11, 4, 3
EPS = torch.finfo(torch.float64).eps
TARGETS = torch.tensor([3, reference.IGNORED, 0, 10, reference.IGNORED, 5, 5])
COUNTS = TARGETS != reference.IGNORED


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = 2 * normal(TOKENS, VOCAB), 2 * normal(TOKENS, VOCAB, seed=1)


def test_cross_entropy_is_the_formula_written_out() -> None:
    logits = 5 * torch.tanh(STUDENT[COUNTS] / 5)
    z = logits.exp().sum(-1)
    label = logits[torch.arange(len(logits)), TARGETS[COUNTS]]
    expected = z.log() - 0.9 * label - 0.1 * logits.mean(-1) + 0.01 * z.log() ** 2
    losses = reference.cross_entropy(STUDENT, TARGETS, None, 5.0, 0.01, 0.1)
    assert not losses[~COUNTS].any()
    torch.testing.assert_close(losses[COUNTS], expected, rtol=64 * EPS, atol=0)
    assert cross_entropy(STUDENT, TARGETS) == F.cross_entropy(STUDENT, TARGETS, reduction="sum")


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_divergences_are_their_definitions(beta: float) -> None:
    p, q = (TEACHER / 2).softmax(-1), (STUDENT / 2).softmax(-1)
    m = beta * p + (1 - beta) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1).where(COUNTS, 0.0)

    definitions = [kl(p, q), kl(q, p), beta * kl(p, m) + (1 - beta) * kl(q, m)]
    for kind, expected in zip(DIVERGENCES, definitions, strict=True):
        losses = reference.distillation(STUDENT, TARGETS, TEACHER, kind, beta, temperature=2.0)
        torch.testing.assert_close(losses, 4 * expected, rtol=256 * EPS, atol=64 * EPS)
        assert reference.distillation(TEACHER, TARGETS, TEACHER, kind, beta).abs().max() < 64 * EPS


def cached(temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    log_p = (TEACHER / temperature).log_softmax(-1)
    log_probs, indices = log_p.topk(KEPT)
    return indices, log_probs, log_p.scatter(1, indices, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_cache_of_all_tokens_is_the_dense_teacher(kind: str) -> None:
    order = TEACHER.argsort(-1)
    log_p = TEACHER.log_softmax(-1).gather(1, order)
    for last in (VOCAB, VOCAB - 1):  # nothing in the tail, or one token, which is then an outcome of its own
        kept = order[:, :last], log_p[:, :last], log_p[:, last:].logsumexp(-1)
        for results in zip(
            cached_distillation_rows(STUDENT, TARGETS, *kept, kind, 0.3, 1.0, 0.7, 0.0, True),
            distillation_rows(STUDENT, TARGETS, TEACHER, kind, 0.3, 1.0, 0.7, 0.0, 0.0, True),
            strict=True,
        ):
            torch.testing.assert_close(*results, rtol=256 * EPS, atol=64 * EPS)


def test_top_k_is_compared_after_the_softmax() -> None:
    """Renormalizing what is kept before the comparison would make a student that is right pay, and a wrong one not."""
    indices, log_probs, tail = cached(1.0)
    right = reference.cached_distillation(TEACHER, TARGETS, indices, log_probs, tail)
    assert right.abs().max() < 64 * EPS
    shifted = TEACHER.scatter_add(1, indices, torch.full(indices.shape, -3.0, dtype=torch.float64))
    wrong = reference.cached_distillation(shifted, TARGETS, indices, log_probs, tail)
    p = log_probs.exp().sum(-1)  # as likely among themselves as before, all of them together less likely
    q = p * math.exp(-3) / (p * math.exp(-3) + 1 - p)
    binary = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(wrong, binary.where(COUNTS, 0.0), rtol=1e-12, atol=1e-14)


def differentiated(losses: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    logits = STUDENT.clone().requires_grad_()
    rows = losses(logits)
    return rows.detach(), torch.autograd.grad(rows.sum(), logits)[0]


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.1), (0.01, 0.1)])
def test_gradient_of_cross_entropy(softcap: float, z_loss: float, smoothing: float) -> None:
    rows = cross_entropy_rows(STUDENT, TARGETS, softcap, z_loss, smoothing, True)
    truth = differentiated(lambda x: reference.cross_entropy(x, TARGETS, None, softcap, z_loss, smoothing))
    for ours, theirs in zip(rows, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=256 * EPS, atol=64 * EPS)
    assert torch.equal(cross_entropy_rows(STUDENT, TARGETS, softcap, z_loss, smoothing, False)[0], rows[0])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 0.6), (2.0, 0.0)])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradient_of_distillation(kind: str, temperature: float, alpha: float, softcap: float) -> None:
    mix = kind, 0.3, temperature, alpha
    kept = cached(temperature)
    pairs = [
        (
            distillation_rows(STUDENT, TARGETS, TEACHER, *mix, softcap, 2.0, True),
            differentiated(lambda x: reference.distillation(x, TARGETS, TEACHER, *mix, None, softcap, 2.0)),
        ),
        (
            cached_distillation_rows(STUDENT, TARGETS, *kept, *mix, softcap, True),
            differentiated(lambda x: reference.cached_distillation(x, TARGETS, *kept, *mix, None, softcap)),
        ),
    ]
    for rows, truth in pairs:
        for ours, theirs in zip(rows, truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=256 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_add_up(dtype: torch.dtype) -> None:
    x, weight = normal(2, TOKENS, WIDTH).to(dtype), normal(VOCAB + 1, WIDTH, seed=1).to(dtype)
    targets = torch.stack((TARGETS, TARGETS.flip(0)))
    teacher = TeacherHead(x.detach(), -weight)
    kept = CachedTeacher(*(each.expand(2, *each.shape) for each in cached(1.0)))
    losses = [
        partial(linear_cross_entropy, targets=targets, label_smoothing=0.1),
        *(partial(linear_distillation, targets=targets, teacher=teacher, divergence=kind) for kind in DIVERGENCES),
        partial(linear_distillation, targets=targets, teacher=kept),
    ]
    for loss in losses:
        results = []
        for at_once in (1, 5, 14, None):
            leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
            total = loss(*leaves, vocab_size=VOCAB, tokens_at_once=at_once)
            results.append((total, *torch.autograd.grad(total / 3, leaves)))
        for result in results:
            assert [each.dtype for each in result] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
            for one, other in zip(result, results[0], strict=True):
                # one rounding where a chunk's product is rounded, one at the end
                torch.testing.assert_close(one, other, rtol=0, atol=float(64 * torch.finfo(dtype).eps))
        assert not results[0][2][VOCAB:].any()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 13])
def test_a_gradient_is_rounded_into_its_own_memory(rows: int) -> None:
    wide = normal(rows, 5).float()
    expected, memory = (wide * 0.7).bfloat16(), wide.data_ptr()
    narrow = head_chunks.scaled(wide, torch.tensor(0.7), torch.bfloat16)
    assert torch.equal(narrow, expected)
    assert narrow.is_contiguous()
    assert narrow.data_ptr() == memory or rows == 0


def test_chunks_on_a_gpu_take_the_memory_that_they_may() -> None:
    def chosen(tokens: int, width: int, share: float) -> int:
        return gpu_tokens(tokens, width, 2, share)

    assert chosen(16384, 2048, CROSS_ENTROPY_SHARE) == 4096
    for tokens, width, share in [(8192, 4096, 0.375), (8192, 4096, 1.0), (5000, 1024, 1.0), (100_000, 64, 1.0)]:
        size = chosen(tokens, width, share)
        assert size % 128 == 0
        assert size <= max(512, 2 * share * width)  # bfloat16 scores, float32 gradient
        assert size - math.ceil(tokens / math.ceil(tokens / size)) < 128, "the last chunk is not a scrap"
    assert chosen(100, 4096, 1.0) == 128
    assert chosen(0, 4096, 1.0) == 1


@pytest.mark.exhaustive  # the same operations as in the interpreter, which are compiled there
def test_compiled_without_a_kernel() -> None:
    x, weight = normal(TOKENS, WIDTH).requires_grad_(), normal(VOCAB, WIDTH, seed=1).requires_grad_()
    loss = partial(linear_cross_entropy, targets=TARGETS, tokens_at_once=3)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    results = torch.autograd.grad(compiled(x, weight), (x, weight))
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_losses_on_the_cpu_import_no_triton() -> None:
    code = (
        "import sys, torch; from kernels.linear_cross_entropy import linear_cross_entropy;"
        "from kernels.cross_entropy import cross_entropy; import kernels.linear_distillation;"
        "x = torch.ones(2, 3, requires_grad=True); t = torch.zeros(2, dtype=torch.int64);"
        "(linear_cross_entropy(x, torch.ones(4, 3), t) + cross_entropy(x, t)).backward();"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
