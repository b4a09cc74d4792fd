"""Lion in plain torch: torch has none, and DeepSpeed's needs a compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Moves every weight by the sign of a mix of momentum and gradient (arXiv:2302.06675, algorithm 2).

    Element by element, so that ZeRO may hand it any part of a weight.

    Args:
        groups: Parameter groups; each may set its own `weight_decay`, which is decoupled.
        learning_rate: Size of every step.
        betas: Share of the momentum in the update, and in the momentum that follows.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], learning_rate: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                update = state["exp_avg"].lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta2)
