"""AdamW for ZeRO's flat shards and for whole parameters, its update one pass over memory where kernels run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kernels.adamw import adamw
from kernels.dispatch import unavailable_reason


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, bit for bit where no kernel runs; its state is the same under the same names everywhere.

    Args:
        groups: Parameter groups; each may set its own `weight_decay`.
        learning_rate: Size of the step.
        betas: Share of the old first and second moment in the new.
        eps: Added to the root of the second moment.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        kernels: str = "auto",
    ) -> None:
        # Fused: on CPU torch's one pass takes two thirds of the time of its default loop.
        super().__init__(groups, learning_rate, betas, eps, weight_decay=0.0, fused=True)
        self._kernels = kernels
        self.max_norm: float | None = None
        """Norm to which updates clip gradients, 0 = they do not; None = somebody else has done so, or has not."""
        self.squares: Tensor | None = None
        """Sum of squares of all gradients on all ranks [], float64, to be set before each update that may clip; which
        is left out where it is not finite."""

    def runs_kernel_on(self, device_type: str) -> bool:
        """Whether updates of parameters on such a device run the kernel."""
        return self._kernels != "reference" and unavailable_reason("triton", device_type) is None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient; nothing that it depends on passes through the host."""
        for group in self.param_groups:
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            exp_avgs: list[Tensor] = []
            exp_avg_sqs: list[Tensor] = []
            steps: list[Tensor] = []
            self._init_group(group, weights, gradients, exp_avgs, exp_avg_sqs, [], steps)  # type: ignore[no-untyped-call]
            adamw(
                weights, gradients, exp_avgs, exp_avg_sqs, steps, learning_rate=group["lr"], betas=group["betas"],
                eps=group["eps"], weight_decay=group["weight_decay"], squares=self.squares,
                max_norm=self.max_norm or 0.0, kernels=self._kernels,
            )  # fmt: skip
