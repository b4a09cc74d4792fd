"""Mixtures of experts in training: DeepSpeed's layer, whose experts may be shared among data-parallel ranks.

Nothing is dropped and nothing is drawn: the layer computes what `flows.model.mixture_of_experts` does.
"""

from __future__ import annotations

import re
from typing import cast

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from flows.config.training import TrainingRun
from flows.model.decoder import Decoder
from flows.model.mixture_of_experts import MixtureOfExperts

_GATE = ".routed.deepspeed_moe.gate.wg.weight"
_EXPERT = re.compile(r"\.routed\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")


def share_experts(model: Decoder, run: TrainingRun) -> None:
    """Puts DeepSpeed's layer in place of each mixture, with this rank's share of the experts; same weights."""
    for layer in model.model.layers:
        if isinstance(mixture := getattr(layer, "block_sparse_moe", None), MixtureOfExperts):
            layer.block_sparse_moe = _RoutedExperts(mixture, run)


class _RoutedExperts(nn.Module):
    """DeepSpeed's layer; `balance_loss` is that of the last forward."""

    def __init__(self, mixture: MixtureOfExperts, run: TrainingRun) -> None:
        super().__init__()
        size = run.engine.expert_parallel_size
        self.routed = MoE(
            mixture.gate.in_features,
            mixture.experts[0],
            len(mixture.experts),
            size,
            mixture.experts_per_token,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.balance_loss = torch.zeros(())
        mine = list(self.routed.deepspeed_moe.experts.deepspeed_experts)
        first = (dist.get_rank() % size) * len(mine)
        with torch.no_grad():
            self.routed.deepspeed_moe.gate.wg.weight.copy_(mixture.gate.weight)
            for number, expert in enumerate(mine, start=first):
                expert.load_state_dict(mixture.experts[number].state_dict())

    def forward(self, x_BLD: Tensor) -> Tensor:
        """What each position adds to its residual stream [B, L, D]."""
        y_BLD, self.balance_loss, _ = self.routed(x_BLD)
        return cast(Tensor, y_BLD)


def balance_penalty(model: Decoder, run: TrainingRun) -> Tensor:
    """What the last forward's unequal use of experts adds to the loss [] (GShard, arXiv:2006.16668)."""
    layers = [module.balance_loss for module in model.modules() if isinstance(module, _RoutedExperts)]
    return run.model.router_aux_loss_coef * torch.stack(layers).sum()


def split_expert_groups(optimizer: torch.optim.Optimizer) -> None:
    """Gives experts parameter groups of their own, as DeepSpeed needs them; nothing changes without experts."""
    for number, group in enumerate(optimizer.param_groups):
        group["name"] = str(number)
    optimizer.param_groups[:] = split_params_into_different_moe_groups_for_optimizer(optimizer.param_groups)


def expert_name(model: nn.Module, name: str) -> str:
    """Name in the decoder of what has the name `name` in `model`, which DeepSpeed trains."""
    found = _EXPERT.search(name)
    if found is None:
        return name.replace(_GATE, ".gate.weight")
    layer = cast(_RoutedExperts, model.get_submodule(name[: found.start()])).routed
    rank = dist.get_rank() % layer.ep_size
    number = rank * layer.num_local_experts + int(found[1])
    return f"{name[: found.start()]}.experts.{number}.{name[found.end() :]}"
