# torch.autograd has few types:
# mypy: disable-error-code="no-untyped-call"
"""AdamW and the gradient's norm as registered operations: what optimizers call; launches are in `kernels.adamw_triton`.

Unscaling, clipping, update and the narrow copy of the weights are one pass over memory, and nothing that they depend on
passes through the host: the sum of squares stays on the device, where it may be summed over ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.registration import register


def _squares_fake(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float64)


def _adamw_fake(*arguments: object) -> None:
    return None


_MODULE = "kernels.adamw_triton"
_squares = register("gradient_squares(Tensor[] gradients) -> Tensor", _MODULE, _squares_fake)
_adamw = register(
    "adamw_(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] copies, Tensor? squares, float learning_rate, float beta1, float beta2, "
    "float eps, float weight_decay, float max_norm, float loss_scale) -> ()",
    _MODULE,
    _adamw_fake,
)


def gradient_squares(gradients: Sequence[Tensor], kernels: str = "auto") -> Tensor:
    """Sum of the squares of all elements; its root is the gradient's norm.

    Added up in the same order on every run, in float64 and, within a block, in float32 scaled by a power of two: no
    gradient is too large or too small for it. Sums of several ranks may be added.

    Args:
        gradients: Of one dtype and device, any shapes; at least one.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        [] in float64 on the gradients' device, without waiting for it; inf or NaN where an element is.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: There is none, or their dtypes differ.
    """
    _check_dtypes("gradients", gradients)
    if not runs_kernel(kernels, gradients[0], columns=1):
        return reference.gradient_squares(gradients)
    return _squares(list(gradients))  # type: ignore[no-any-return]


@torch.no_grad()
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
    kernels: str = "auto",
) -> None:
    """Updates weights and moments in place with decoupled decay (arXiv:1711.05101, algorithm 2), as torch.optim.AdamW.

    With `squares`, gradients are first clipped to `max_norm`; if an element on any rank is not finite, nothing changes.

    Args:
        weights: Float32, contiguous, any shapes: whole parameters or flat shards.
        gradients: Of the weights' shapes; float32, float16 or bfloat16.
        exp_avgs: First moments, float32.
        exp_avg_sqs: Second moments, float32.
        steps: Number of updates that each weight has had [], float32; one more afterwards.
        learning_rate: Size of the step.
        betas: Share of the old first and second moment in the new.
        eps: Added to the root of the second moment.
        weight_decay: Share of the weight that is taken off, times `learning_rate`.
        squares: Sum of squares of all gradients, scaled as they are [], from `gradient_squares`, over all ranks.
        max_norm: Gradients longer than this together are shortened to it; 0 = they are not. Read only with `squares`.
        loss_scale: What the loss was multiplied by; gradients are divided by it.
        copies: Where the new weights are also written, float16 or bfloat16 of the weights' shapes, contiguous; empty =
            nowhere.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: The lists do not fit together.
    """
    if not weights:
        return
    _check(weights, gradients=gradients, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, copies=copies or weights)
    if len(steps) != len(weights):
        raise ValueError(f"there are {len(steps)} steps for {len(weights)} weights")
    if not all(copy.is_contiguous() for copy in copies):
        raise ValueError("copies have to be contiguous")
    stored = [*weights, *exp_avgs, *exp_avg_sqs, *steps]
    if runs_kernel(kernels, gradients[0], columns=1, unfit=_unfit(stored, [*gradients, *copies])):
        _adamw(
            list(weights), list(gradients), list(exp_avgs), list(exp_avg_sqs), list(steps), list(copies), squares,
            learning_rate, *betas, eps, weight_decay, max_norm, loss_scale,
        )  # fmt: skip
        torch.autograd.graph.increment_version([*stored, *copies])
        return
    reference.adamw(
        weights, gradients, exp_avgs, exp_avg_sqs, steps, learning_rate=learning_rate, betas=betas, eps=eps,
        weight_decay=weight_decay, squares=squares, max_norm=max_norm, loss_scale=loss_scale, copies=copies,
    )  # fmt: skip


def _unfit(stored: Sequence[Tensor], narrow: Sequence[Tensor]) -> str | None:
    dtypes, devices = {tensor.dtype for tensor in stored}, {tensor.device for tensor in (*stored, *narrow)}
    if dtypes != {torch.float32}:
        return f"weights, moments and steps have to be float32, not {' or '.join(sorted(map(str, dtypes)))}"
    if len(devices) > 1:
        return f"all tensors have to be on one device, not on {' and '.join(sorted(map(str, devices)))}"
    if not all(tensor.is_contiguous() for tensor in stored):
        return "weights and moments have to be contiguous"
    return None


def _check(weights: Sequence[Tensor], **others: Sequence[Tensor]) -> None:
    shapes = [weight.shape for weight in weights]
    for name, tensors in others.items():
        if [tensor.shape for tensor in tensors] != shapes:
            wrong = [list(tensor.shape) for tensor in tensors]
            raise ValueError(f"{name} have shapes {wrong}; weights have {[list(shape) for shape in shapes]}")
        _check_dtypes(name, tensors)


def _check_dtypes(name: str, tensors: Sequence[Tensor]) -> None:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1:
        raise ValueError(f"{name} have to be of one dtype, not of {sorted(map(str, dtypes)) or 'none'}")
