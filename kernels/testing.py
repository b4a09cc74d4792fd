"""How a kernel is held against the truth: derived tolerance, memory that betrays what was not written, strides."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.dispatch import INTERPRETED


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, fresh memory is NaN (torch.utils.deterministic), so that an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


@contextmanager
def strict_memory() -> Iterator[None]:
    """`poisoned_memory`, and where kernels are interpreted `guarded_memory`."""
    if not INTERPRETED:
        with poisoned_memory():
            yield
        return
    from kernels.memory_guard import guarded_memory

    with poisoned_memory(), guarded_memory():
        yield


def apart(x: Tensor) -> Tensor:
    """The tensor with a gap after every element; in gaps is what must not be read: NaN, where there is one."""
    return torch.stack((x, _unreadable(x)), dim=-1)[..., 0]


def padded(x: Tensor) -> Tensor:
    """The tensor with a gap after every row."""
    return torch.cat((x, _unreadable(x)), dim=-1)[..., : x.shape[-1]]


def turned(x: Tensor) -> Tensor:
    """The tensor with columns that lie together, not rows; `apart` if it has one dimension."""
    return x.mT.contiguous().mT if x.dim() > 1 else apart(x)


def _unreadable(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan) if x.is_floating_point() else x


def assert_close_to_truth(actual: Tensor, plain: Tensor, truth: Tensor, magnitude: Tensor | None = None) -> None:
    """Fails unless each element is as near to the truth as its dtype and float32 arithmetic allow.

    Allowed are twice plain torch's largest error; one unit in the last place, for rounding the result; and 16 roundings
    in float32 of the terms that add up to it, which outlast the result where they cancel.

    Args:
        actual: What the kernel gave.
        plain: What plain torch gives in the same dtype: how well that dtype can do.
        truth: The result in float64, from the same (rounded) inputs.
        magnitude: Sum of the sizes of the terms that add up to each element; without it they are taken not to cancel.

    Raises:
        AssertionError: With the largest error, and what was allowed there.
    """
    assert actual.dtype == plain.dtype, f"{actual.dtype} instead of {plain.dtype}"
    assert actual.shape == truth.shape, f"shape {list(actual.shape)} instead of {list(truth.shape)}"
    assert actual.isfinite().all(), f"{(~actual.isfinite()).sum()} of {actual.numel()} elements are not finite"
    if not truth.numel():
        return
    error, plain_error = (actual.double() - truth).abs(), (plain.double() - truth).abs().max()
    rounding = torch.finfo(actual.dtype).eps * truth.abs() + torch.finfo(actual.dtype).tiny
    terms = 16 * torch.finfo(torch.float32).eps / 2 * (truth.abs() if magnitude is None else magnitude)
    allowed = 2 * plain_error + rounding + terms
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"error {error.flatten()[worst]:.3g} where {allowed.flatten()[worst]:.3g} is allowed "
        f"(plain torch errs by {plain_error:.3g}, truth there is {truth.flatten()[worst]:.6g})"
    )
