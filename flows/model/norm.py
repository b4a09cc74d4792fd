"""Root mean square normalization, of activations or of their sum with the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flows.config.model import ModelConfig
from kernels.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Scales the last dimension to a root mean square of one, then by a learned weight (arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = config.rms_norm_eps
        self.kernels = config.kernels.value

    def forward(self, x: Tensor) -> Tensor:
        """Normalized activations [..., width]."""
        return rms_norm(x, self.weight, self.eps, self.kernels)


class AddRMSNorm(RMSNorm):
    """Adds to the residual stream and normalizes the sum, in one pass over memory."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Normalized sum and the sum itself, the new residual stream [..., width]."""
        return add_rms_norm(x, residual, self.weight, self.eps, self.kernels)
