"""Update rules in plain torch, right on CPU and GPU without a compiler at hand, and their parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.training.adamw import AdamW
from flows.training.lion import Lion
from flows.training.muon import Muon

HEADS = ("lm_head", "embed_out", "decoder", "vocab_projector")
"""Names of output projections in our decoder and in those of transformers."""


def build_optimizer(model: nn.Module, config: OptimizerConfig, kernels: str) -> torch.optim.Optimizer:
    """The optimizer over the weights that are trained: matrices decay, vectors (norms, biases) do not.

    Decay is decoupled for AdamW (arXiv:1711.05101), Lion and Muon, part of the gradient for the others, as in torch.

    Args:
        model: Its parameters' names and shapes decide on their groups.
        config: Rule and constants.
        kernels: The model's setting; AdamW's update is one of its operations.
    """
    hidden, embeddings, vectors = parameter_groups(model, config)
    groups = [group for group in (hidden, embeddings, vectors) if group["params"]]
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    match config.name:
        case Optimizer.adamw:
            return AdamW(groups, rate, betas, config.eps, kernels)
        case Optimizer.adam:
            return torch.optim.Adam(groups, rate, betas, config.eps, fused=True)
        case Optimizer.sgd:
            return torch.optim.SGD(groups, rate, config.momentum)
        case Optimizer.rmsprop:
            return torch.optim.RMSprop(groups, rate, config.beta2, config.eps, momentum=config.momentum)
        case Optimizer.lion:
            return Lion(groups, rate, betas)
        case Optimizer.muon:
            others = [group for group in (embeddings, vectors) if group["params"]]
            return Muon(hidden, others, rate, config.momentum, betas, config.eps)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Three parameter groups: hidden matrices, embeddings and output projection, vectors."""
    outer = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in HEADS
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in trained if _ndim(parameter) < 2]
    matrices = [parameter for parameter in trained if _ndim(parameter) >= 2]
    embedding_decay = config.weight_decay if config.decay_embeddings else 0.0
    return [
        {"params": [p for p in matrices if id(p) not in outer], "weight_decay": config.weight_decay},
        {"params": [p for p in matrices if id(p) in outer], "weight_decay": embedding_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _ndim(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty shard in its place
