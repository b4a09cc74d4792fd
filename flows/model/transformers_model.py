# Calling a module is untyped in torch, and transformers ships no types:
# mypy: disable-error-code="no-any-return,no-untyped-call"
"""A language model of the transformers library, causal or masked, as it is, with the interface of our decoder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flows.config.model import Architecture, Family, ModelConfig
from flows.model.attention import positions
from flows.model.config_json import CONFIG, CheckpointError, read_json
from flows.model.decoder import Decoder

KINDS = ("gemma", "gpt2", "gpt_neox", "gptj", "olmo2", "opt", "phi", "phi3", "smollm3")
"""Values of `model_type` whose models were exported and computed the same; of others, some cannot be exported."""
MASKED_HEADS = {
    "bert": ("cls",),
    "camembert": ("lm_head",),
    "distilbert": ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    "modernbert": ("head", "decoder"),
    "roberta": ("lm_head",),
    "xlm-roberta": ("lm_head",),
}
"""Of encoders, by `model_type`: modules that turn hidden states into scores, one after the other."""
COUNT_FROM_PADDING = ("camembert", "roberta", "xlm-roberta")
"""Encoders whose first position is the one after `pad_token_id`."""


class TransformersModel(nn.Module):
    """Token ids to scores of every next token.

    Args:
        inner: The library's model.
    """

    family = Family.causal_lm

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


class MaskedModel(TransformersModel):
    """Token ids to scores of the tokens that belong at every position, hidden ones among them."""

    family = Family.masked_lm

    @property
    def lm_head(self) -> nn.Module:
        """Turns hidden states into scores."""
        return nn.Sequential(*(getattr(self.inner, name) for name in MASKED_HEADS[self.inner.config.model_type]))

    def forward_hidden(
        self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None, document_ids_BL: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, L, D] before the head; see `flows.model.decoder.Decoder.forward_hidden`.

        Every token looks at all of its document. Positions start anew with each document.
        """
        config = self.inner.config
        positions_BL = positions(input_ids_BL, attention_mask_BL, document_ids_BL)
        if config.model_type in COUNT_FROM_PADDING:
            positions_BL = positions_BL + config.pad_token_id + 1
        length = input_ids_BL.shape[1]
        order_L = torch.arange(length, device=input_ids_BL.device)
        seen_BLL = torch.ones_like(input_ids_BL, dtype=torch.bool)[:, None, :].expand(-1, length, -1)
        if attention_mask_BL is not None:
            seen_BLL = seen_BLL & (attention_mask_BL[:, None, :] != 0)
        if document_ids_BL is not None:
            seen_BLL = seen_BLL & (document_ids_BL[:, :, None] == document_ids_BL[:, None, :])
        masks: Any = seen_BLL[:, None]
        if config.model_type == "modernbert":  # some of its layers see neighbours only
            near_LL = (order_L[:, None] - order_L[None, :]).abs() <= config.sliding_window
            # padding that has no neighbour to see sees itself, else what comes out is not a number
            nearby_BLL = seen_BLL & near_LL | (order_L[:, None] == order_L[None, :])
            masks = {"full_attention": masks, "sliding_attention": nearby_BLL[:, None]}
        return self.inner.base_model(
            input_ids=input_ids_BL, attention_mask=masks, position_ids=positions_BL
        ).last_hidden_state

    def forward(
        self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None, document_ids_BL: Tensor | None = None
    ) -> Tensor:
        """Scores [B, L, V] of the token at each position; arguments as in `forward_hidden`."""
        return self.lm_head(self.forward_hidden(input_ids_BL, attention_mask_BL, document_ids_BL))


def named_weights_module(model: nn.Module) -> nn.Module:
    """The module whose parameters have Hugging Face's names."""
    return model.inner if isinstance(model, TransformersModel) else model


def is_transformers_kind(kind: object) -> bool:
    """Whether models of that `model_type` are taken as they are."""
    return kind in KINDS or kind in MASKED_HEADS


def check_kind(directory: Path, family: Family | None = None) -> dict[str, Any]:
    """config.json of a model that can be taken as it is; imports nothing.

    Args:
        directory: Hugging Face directory.
        family: What it has to be; None = either.

    Raises:
        CheckpointError: The library is missing, or the model is of another family or of a kind that was not tried.
    """
    found = read_json(directory)
    kind = found.get("model_type")
    if not is_transformers_kind(kind):
        raise CheckpointError(
            f"{directory / CONFIG} has model_type={kind}; what is taken as it is: {', '.join(KINDS)} with "
            f"model.family=causal_lm, {', '.join(MASKED_HEADS)} with masked_lm. "
            "Llama, Qwen2 and Qwen3 run in our decoder: model.architecture=decoder."
        )
    own = Family.masked_lm if kind in MASKED_HEADS else Family.causal_lm
    if family not in (None, own):
        raise CheckpointError(
            f"{directory / CONFIG} has model_type={kind}, which is no {family}. Set model.family={own}."
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
    unused = found.get("pad_token_id", 1) + 1 if found.get("model_type") in COUNT_FROM_PADDING else 0
    return None if longest is None else int(longest) - unused


def model_without_weights(config: ModelConfig) -> nn.Module:
    """What a configuration describes, with Hugging Face's names, on the meta device; of one token, if it is ours."""
    with torch.device("meta"):
        if config.architecture == Architecture.decoder:
            return Decoder(config, vocab_size=1)
        from transformers import AutoConfig

        assert config.initial_weights is not None
        described = AutoConfig.from_pretrained(config.initial_weights, local_files_only=True, trust_remote_code=False)
        return _library_class(described.model_type).from_config(described, trust_remote_code=False)


def _library_class(kind: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if kind in MASKED_HEADS else AutoModelForCausalLM


def load_transformers_model(directory: Path) -> TransformersModel:
    """The model in a directory, on the CPU, in float32, from config.json and safetensors alone: no code of its own.

    Raises:
        CheckpointError: A file is missing or damaged, or the scores are not the output projection of hidden states.
    """
    kind = check_kind(directory)["model_type"]
    from transformers.utils.logging import disable_progress_bar  # seconds of imports

    disable_progress_bar()
    try:
        loaded: Any = _library_class(kind).from_pretrained(
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
    model = MaskedModel(inner) if kind in MASKED_HEADS else TransformersModel(inner)
    words = [number for number in range(model.vocab_size) if number != inner.config.pad_token_id]
    ids = torch.tensor([words[:4]])  # some encoders' positions do not count padding, whatever the mask says
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
