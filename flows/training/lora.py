# Calling a module is untyped in torch, and safetensors has few types:
# mypy: disable-error-code="no-any-return,no-untyped-call"
"""Low-rank adapters (LoRA, arXiv:2106.09685): put in, merged into the weights, and kept in PEFT's file format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from flows.artifact import write_json_atomically
from flows.config.checks import ConfigError
from flows.config.lora import LoraConfig

ADAPTERS = (".lora_A.weight", ".lora_B.weight")
"""Ends of the names of adapter weights, as PEFT names them."""
DOWN, UP = ADAPTERS
ADAPTER_DIR = "adapter"
"""Below the model directory: an adapter_config.json beside config.json would make transformers apply it once more."""


class LoraLinear(nn.Linear):
    """A frozen linear layer plus scale x B A: its own weight keeps its name.

    Args:
        linear: The layer whose weights it takes over.
        config: Rank, scale, dropout.
        generator: Draws A from normal(0, 1 / rank), as PEFT's "gaussian"; B is zero, so that training starts from the
            layer as it was (section 4.1).
    """

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        device, dtype = linear.weight.device, linear.weight.dtype
        self.lora_A = nn.Linear(linear.in_features, config.rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(config.rank, linear.out_features, bias=False, device=device, dtype=dtype)
        self.scale, self.dropout = config.scale, config.dropout
        with torch.no_grad():
            shape = self.lora_A.weight.shape
            self.lora_A.weight.copy_(torch.empty(shape).normal_(0.0, 1 / config.rank, generator=generator))
            self.lora_B.weight.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., out_features]."""
        adapted = self.lora_B(self.lora_A(F.dropout(input, self.dropout, self.training)))
        return super().forward(input) + self.scale * adapted


def add_adapters(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freezes the model and gives every linear module that matches `targets` an adapter; `replaced` ones are trained.

    Raises:
        ConfigError: A module that is adapted or replaced shares its weight with another, which would change with it.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    sharing = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sharing[id(parameter)].add(name)
    for name, module in list(model.named_modules()):
        if any(fnmatchcase(name, pattern) for pattern in config.replaced):
            _require_own_weights("replaced", name, module, config, sharing)
            module.requires_grad_(True)
        elif isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in config.targets):
            _require_own_weights("targets", name, module, config, sharing)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoraLinear(module, config, generator))


def _require_own_weights(
    field: str, name: str, module: nn.Module, config: LoraConfig, sharing: Mapping[int, set[str]]
) -> None:
    for parameter in module.parameters():
        if len(sharing[id(parameter)]) > 1:
            raise ConfigError(
                f"train.lora.{field}={list(getattr(config, field))} names {name}, but "
                f"{' and '.join(sorted(sharing[id(parameter)]))} are one matrix: both would change. "
                f"Set model.tie_word_embeddings=false if the model allows it, or leave {name} out."
            )


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The model's own weights with all adapters added, W + scale x B A, computed in float32."""
    plain = {name: weight for name, weight in weights.items() if not name.endswith(ADAPTERS)}
    for name, down in weights.items():
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            weight = plain[f"{module}.weight"]
            update = config.scale * (weights[module + UP].float() @ down.float())
            plain[f"{module}.weight"] = (weight.float() + update).to(weight.dtype)
    return plain


def save_adapter(directory: Path, weights: Mapping[str, Tensor], replaced: set[str], config: LoraConfig) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, as `peft.PeftModel.from_pretrained` reads them.

    Args:
        directory: Where to; made if missing.
        weights: All weights by name, adapters among them.
        replaced: Names of the weights that were trained in full.
        config: What was trained.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kept = {name for name in weights if name.endswith(ADAPTERS) or name in replaced}
    tensors = {f"base_model.model.{name}": weights[name].contiguous() for name in sorted(kept)}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # wherever it lies: model.initial_weights of this run
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(name.removesuffix(DOWN) for name in weights if name.endswith(DOWN)),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in replaced}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json_atomically(directory / "adapter_config.json", description)
