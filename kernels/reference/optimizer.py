"""Updates of weights."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _torch_adamw


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
