# Shape letters are upper case; calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""A mixture of experts in place of the feed-forward layer, with Mixtral's weights (arXiv:2401.04088).

Shape letters: B batch, L length, D hidden size, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from flows.config.model import ModelConfig
from kernels.glu import swiglu


class Expert(nn.Module):
    """SwiGLU (arXiv:2002.05202) under Mixtral's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.kernels = config.kernels.value

    def forward(self, x_BLD: Tensor) -> Tensor:
        """What the expert makes of each position [B, L, D]."""
        return self.w2(swiglu(self.w1(x_BLD), self.w3(x_BLD), self.kernels))


class MixtureOfExperts(nn.Module):
    """The mean of each position's best experts, weighted by how well they suit it.

    Every expert sees every position and the weights of most are zero: the plainest form, which any export keeps.
    Training runs `flows.training.expert_parallel`, where experts see their own positions only.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))
        self.experts_per_token = config.num_experts_per_tok

    def forward(self, x_BLD: Tensor) -> Tensor:
        """What each position adds to its residual stream [B, L, D]."""
        probabilities_BLE = self.gate(x_BLD).softmax(-1, dtype=torch.promote_types(x_BLD.dtype, torch.float32))
        weights_BLE = expert_weights(probabilities_BLE, self.experts_per_token).to(x_BLD.dtype)
        y_BLD = torch.zeros_like(x_BLD)
        for number, expert in enumerate(self.experts):
            y_BLD = y_BLD + weights_BLE[..., number, None] * expert(x_BLD)
        return y_BLD


def expert_weights(probabilities_BLE: Tensor, experts_per_token: int) -> Tensor:
    """The probabilities of each position's best experts, scaled to a sum of one; zero for all others [B, L, E]."""
    best, experts = probabilities_BLE.topk(experts_per_token, dim=-1)
    best = best / best.sum(-1, keepdim=True)
    return (one_hot(experts, probabilities_BLE.shape[-1]) * best[..., None]).sum(-2)
