"""Counts from names and shapes, against a model whose weights were chosen and an optimizer after its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flows.config import ConfigError
from flows.config.lora import LoraConfig
from flows.config.optimizer import Optimizer, OptimizerConfig
from flows.config.training import TrainConfig, TrainingRun
from flows.model.decoder import Decoder
from flows.training.optimizers import build_optimizer
from flows.training.trainable import choose_weights
from flows.training.trained_weights import trained_weights
from flows.training.weight_average import keep_average

VOCAB_SIZE = 64


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "train",
    [
        *({"optimizer": OptimizerConfig(name=name, learning_rate=1e-3)} for name in Optimizer),
        {"optimizer": OptimizerConfig(name=Optimizer.sgd, momentum=0.0)},
        {"trainable": ("*.mlp.*",), "freeze": ("*.layers.0.*",)},
        {"lora": LoraConfig(rank=2)},
        {"lora": LoraConfig(rank=2, targets=("*.q_proj", "lm_head"), replaced=("model.layers.1.mlp",))},
        {"ema_decay": 0.9},
    ],
    ids=lambda train: "-".join(str(getattr(one, "name", one)) for one in train.values())[:40],
)
def test_counts_are_those_of_the_model_and_its_optimizer(
    train: dict[str, Any], tied: bool, tiny_run: Callable[..., TrainingRun]
) -> None:
    base = tiny_run()
    config = TrainConfig(global_batch_size=8, micro_batch_size=4, **train)
    run = replace(base, train=replace(base.train), model=replace(base.model, tie_word_embeddings=tied))
    object.__setattr__(run, "train", config)  # adapters want initial weights, which no count depends on
    model = Decoder(run.model, VOCAB_SIZE)
    if tied and "lm_head" in config.lora.targets:
        with pytest.raises(ConfigError, match="are one matrix: both would change"):
            choose_weights(model, config, seed=0)
        return
    choose_weights(model, config, seed=0)
    optimizer = build_optimizer(model, config.optimizer, "reference")
    if config.ema_decay:
        keep_average(optimizer)
        for group in optimizer.param_groups:
            group["ema_decay"] = config.ema_decay
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    trained = [p for p in model.parameters() if p.requires_grad]
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    kept = sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim() > 0)

    counts = trained_weights(run, VOCAB_SIZE)
    assert counts.all == sum(p.numel() for p in model.parameters())
    assert counts.trained == sum(p.numel() for p in trained)
    assert counts.frozen_matrices == sum(p.numel() for p in matrices if not p.requires_grad)
    assert counts.optimizer_states == kept
