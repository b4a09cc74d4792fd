# Calling a module is untyped in torch, and transformers ships no types:
# mypy: disable-error-code="no-any-return,no-untyped-call"
"""A causal language model of the transformers library, as it is, with the interface of our decoder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flows.config.model import Architecture, ModelConfig
from flows.model.config_json import CONFIG, CheckpointError, read_json
from flows.model.decoder import Decoder

KINDS = ("gemma", "gpt2", "gpt_neox", "gptj", "olmo2", "opt", "phi", "phi3", "smollm3")
"""Values of `model_type` whose models were exported and computed the same; of others, some cannot be exported."""
ENCODERS = ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta")
"""Values of `model_type` that people may well try, and that fill in masked tokens."""


class TransformersModel(nn.Module):
    """Token ids to scores of every next token.

    Args:
        inner: The library's model.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.vocab_size: int = inner.config.vocab_size

    @property
    def lm_head(self) -> nn.Module:
        """Turns hidden states into scores."""
        return self.inner.get_output_embeddings()

    def forward_hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] after the final norm; see `flows.model.decoder.Decoder.forward_hidden`."""
        positions_BL = None if attention_mask_BL is None else (attention_mask_BL.cumsum(1) - 1).clamp(min=0)
        return self.inner.base_model(
            input_ids=input_ids_BL, attention_mask=attention_mask_BL, position_ids=positions_BL, use_cache=False
        ).last_hidden_state

    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor:
        """Scores [B, L, V] of the token that follows each position; arguments as in `forward_hidden`."""
        return self.lm_head(self.forward_hidden(input_ids_BL, attention_mask_BL))


def named_weights_module(model: nn.Module) -> nn.Module:
    """The module whose parameters have Hugging Face's names."""
    return model.inner if isinstance(model, TransformersModel) else model


def check_kind(directory: Path) -> dict[str, Any]:
    """config.json of a model that can be taken as it is; imports nothing.

    Raises:
        CheckpointError: The library is missing, or the model is of a kind that was not tried.
    """
    found = read_json(directory)
    kind = found.get("model_type")
    if kind in ENCODERS:
        raise CheckpointError(
            f"{directory / CONFIG} has model_type={kind}, an encoder. What is trained, measured and served here is the "
            f"next token, and encoders have none. Name a causal language model: {', '.join(KINDS)}."
        )
    if kind not in KINDS:
        raise CheckpointError(
            f"{directory / CONFIG} has model_type={kind}; what is taken as it is: {', '.join(KINDS)}. "
            "Llama, Qwen2 and Qwen3 run in our decoder: model.architecture=decoder."
        )
    if found.get("sliding_window") and found.get("use_sliding_window", True):
        raise CheckpointError(
            f"{directory / CONFIG} has sliding_window={found['sliding_window']}, which cannot be exported. "
            "Set it to null there, if data.sequence_length stays below it: nothing changes then."
        )
    if find_spec("transformers") is None:
        raise CheckpointError("the transformers library is not installed. Run pip install 'millrace[transformers]'.")
    return found


def longest_context(found: Mapping[str, Any]) -> int | None:
    """Positions that a config.json allows, in tokens; None = it names no limit."""
    longest = found.get("max_position_embeddings", found.get("n_positions"))
    return None if longest is None else int(longest)


def model_without_weights(config: ModelConfig) -> nn.Module:
    """What a configuration describes, with Hugging Face's names, on the meta device; of one token, if it is ours."""
    with torch.device("meta"):
        if config.architecture == Architecture.decoder:
            return Decoder(config, vocab_size=1)
        from transformers import AutoConfig, AutoModelForCausalLM

        assert config.initial_weights is not None
        described = AutoConfig.from_pretrained(config.initial_weights, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(described, trust_remote_code=False)


def load_transformers_model(directory: Path) -> TransformersModel:
    """The model in a directory, on the CPU, in float32, from config.json and safetensors alone: no code of its own.

    Raises:
        CheckpointError: A file is missing or damaged, or the scores are not the output projection of hidden states.
    """
    check_kind(directory)
    from transformers import AutoModelForCausalLM  # seconds of imports
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be read by transformers: {str(error).splitlines()[0]}") from error
    inner, report = loaded
    if report["missing_keys"]:
        raise CheckpointError(f"{directory} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}.")
    model = TransformersModel(inner)
    ids = torch.arange(4)[None] % model.vocab_size
    with torch.no_grad():
        theirs, ours = inner.eval()(ids).logits, model(ids)
    if not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4):
        raise CheckpointError(f"{directory} does more to its scores than projecting hidden states. Use another model.")
    return model


def save_transformers_model(directory: Path, model: TransformersModel, weights: Mapping[str, Tensor]) -> None:
    """Writes config.json and model.safetensors with these weights, as transformers reads them.

    Args:
        directory: Where to; made if missing.
        model: Whose configuration and names it is; its own weights are not read.
        weights: Whole weights by name.
    """
    model.inner.save_pretrained(directory, state_dict=dict(weights), max_shard_size="1TB")
