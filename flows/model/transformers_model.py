# Calling a module is untyped in torch, and transformers ships no types:
# mypy: disable-error-code="no-any-return,no-untyped-call"
"""A model of the transformers library as it is, with the interface of our decoder: causal, masked, or to classify.

Shape letters: B batch, L length, D hidden size, V vocabulary, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flows.config.model import Architecture, Family, ModelConfig
from flows.model.attention import last_places, positions
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
RELU = "relu"
"""Stands for the function of that name, which is no module."""
_ROBERTA_HEAD, _SCORE = ("classifier",), ("score",)
CLASS_HEADS = {
    "bert": ("bert.pooler", "dropout", "classifier"),
    "camembert": _ROBERTA_HEAD,
    "distilbert": ("pre_classifier", RELU, "dropout", "classifier"),
    "modernbert": ("head", "drop", "classifier"),
    "roberta": _ROBERTA_HEAD,
    "xlm-roberta": _ROBERTA_HEAD,
    **dict.fromkeys(
        ("gemma", "gpt2", "gpt_neox", "gptj", "llama", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3"), _SCORE
    ),
}
"""Of models that classify texts, by `model_type`: modules that turn one token's hidden state into scores of labels."""
CLASSIFIER = "ForSequenceClassification"
"""End of the names of their classes."""
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
    def longest(self) -> int | None:
        """Positions that it has, in tokens; None = any number."""
        return longest_context(self.inner.config.to_dict())

    @property
    def lm_head(self) -> nn.Module:
        """Turns hidden states into scores."""
        return self.inner.get_output_embeddings()

    def forward_hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] after the final norm; see `flows.model.decoder.Decoder.forward_hidden`."""
        return _decoder_states(self.inner, input_ids_BL, attention_mask_BL)

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
        return _encoder_states(self.inner, input_ids_BL, attention_mask_BL, document_ids_BL)

    def forward(
        self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None, document_ids_BL: Tensor | None = None
    ) -> Tensor:
        """Scores [B, L, V] of the token at each position; arguments as in `forward_hidden`."""
        return self.lm_head(self.forward_hidden(input_ids_BL, attention_mask_BL, document_ids_BL))


class ClassifierModel(TransformersModel):
    """Token ids to scores of every label, from what encoders make of the first token, decoders of the last."""

    family = Family.sequence_classification

    @property
    def labels(self) -> list[str]:
        """Names of the labels, in the order of the scores."""
        names: dict[int, str] = self.inner.config.id2label
        return [names[number] for number in range(len(names))]

    def forward_hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] before the head; see `flows.model.decoder.Decoder.forward_hidden`."""
        states = _encoder_states if self.inner.config.model_type in MASKED_HEADS else _decoder_states
        return states(self.inner, input_ids_BL, attention_mask_BL)

    def forward(
        self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None, document_ids_BL: Tensor | None = None
    ) -> Tensor:
        """Scores [B, 1, C] of the text in each row, which is its document 0 where there are others."""
        kind, rows = self.inner.config.model_type, input_ids_BL.shape[0]  # len would be a constant of the program
        if document_ids_BL is not None:
            attention_mask_BL = (document_ids_BL == 0).to(input_ids_BL.dtype)
        mask_BL = torch.ones_like(input_ids_BL) if attention_mask_BL is None else attention_mask_BL
        places_B = mask_BL.argmax(1) if kind in MASKED_HEADS else last_places(mask_BL)
        states_BLD = self.forward_hidden(input_ids_BL, attention_mask_BL)
        x = states_BLD[torch.arange(rows, device=states_BLD.device), places_B][:, None]
        for name in CLASS_HEADS[kind]:
            x = x.relu() if name == RELU else self.inner.get_submodule(name)(x)
        return x.view(rows, 1, -1)


def _decoder_states(inner: Any, input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> Tensor:
    positions_BL = None if attention_mask_BL is None else (attention_mask_BL.cumsum(1) - 1).clamp(min=0)
    return inner.base_model(
        input_ids=input_ids_BL, attention_mask=attention_mask_BL, position_ids=positions_BL, use_cache=False
    ).last_hidden_state


def _encoder_states(
    inner: Any, input_ids_BL: Tensor, attention_mask_BL: Tensor | None, document_ids_BL: Tensor | None = None
) -> Tensor:
    config = inner.config
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
    return inner.base_model(input_ids=input_ids_BL, attention_mask=masks, position_ids=positions_BL).last_hidden_state


def named_weights_module(model: nn.Module) -> nn.Module:
    """The module whose parameters have Hugging Face's names."""
    return model.inner if isinstance(model, TransformersModel) else model


def own_family(found: Mapping[str, Any]) -> Family | None:
    """What a model with this config.json is, where it is one that is taken as it is."""
    kind = found.get("model_type")
    if kind in CLASS_HEADS and str(found.get("architectures")).endswith(f"{CLASSIFIER}']"):
        return Family.sequence_classification
    if kind in MASKED_HEADS:
        return Family.masked_lm
    return Family.causal_lm if kind in KINDS else None


def check_kind(directory: Path, family: Family | None = None) -> dict[str, Any]:
    """config.json of a model that can be taken as it is; imports nothing.

    Args:
        directory: Hugging Face directory.
        family: What it has to be, or, to classify texts, become; None = any.

    Raises:
        CheckpointError: The library is missing, or the model is of another family or of a kind that was not tried.
    """
    found = read_json(directory)
    kind, own = found.get("model_type"), own_family(found)
    classifies = family == Family.sequence_classification
    if kind not in CLASS_HEADS if classifies else own is None:
        raise CheckpointError(
            f"{directory / CONFIG} has model_type={kind}; what is taken as it is: {', '.join(KINDS)} with "
            f"model.family=causal_lm, {', '.join(MASKED_HEADS)} with masked_lm, {', '.join(CLASS_HEADS)} with "
            "sequence_classification. Llama, Qwen2 and Qwen3 predict text in our decoder: model.architecture=decoder."
        )
    if not classifies and family not in (None, own):
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

        if config.initial_weights is None:
            return new_encoder(config, vocab_size=1, labels=("one", "other"), sequence_length=1).inner
        described = AutoConfig.from_pretrained(config.initial_weights, local_files_only=True, trust_remote_code=False)
        return _library_class(config.family).from_config(described, trust_remote_code=False)


def _library_class(family: Family) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    return {
        Family.causal_lm: AutoModelForCausalLM,
        Family.masked_lm: AutoModelForMaskedLM,
        Family.sequence_classification: AutoModelForSequenceClassification,
    }[family]


def _named(labels: Sequence[str]) -> dict[str, Any]:
    """What config.json says of labels; a model that has them is trained to choose one of them."""
    numbered = dict(enumerate(labels))
    return {
        "id2label": numbered,
        "label2id": {name: number for number, name in numbered.items()},
        "problem_type": "single_label_classification",
    }


def new_encoder(config: ModelConfig, vocab_size: int, labels: Sequence[str], sequence_length: int) -> ClassifierModel:
    """A BERT of this shape that classifies, its weights drawn from torch's generator."""
    from transformers import BertConfig, BertForSequenceClassification

    shape = BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        initializer_range=config.initializer_range,
        max_position_embeddings=sequence_length,
        type_vocab_size=1,
        pad_token_id=None,
        **_named(labels),
    )
    return ClassifierModel(BertForSequenceClassification(shape))


def load_transformers_model(directory: Path, labels: Sequence[str] | None = None) -> TransformersModel:
    """The model in a directory, on the CPU, in float32, from config.json and safetensors alone: no code of its own.

    Args:
        directory: Hugging Face directory.
        labels: Names of the labels that texts are to get; a model that knows none gets a head for them, drawn from
            torch's generator. None = the model is what it is.

    Raises:
        CheckpointError: A file is missing or damaged, the scores are not the output projection of hidden states, or the
            model was trained to give other labels.
    """
    found = check_kind(directory, None if labels is None else Family.sequence_classification)
    own = own_family(found)
    family = own if labels is None else Family.sequence_classification
    assert family is not None
    known = [name for _, name in sorted(found.get("id2label", {}).items(), key=lambda one: int(one[0]))]
    if labels is not None and own == family and known != [*labels]:
        raise CheckpointError(
            f"{directory / CONFIG} says that the model gives the labels {known}, and the data has {[*labels]}. "
            f"Set data.corpus.labels=[{','.join(known)}], or start from a model that gives none."
        )
    from transformers.utils.logging import disable_progress_bar  # seconds of imports

    disable_progress_bar()
    try:
        loaded: Any = _library_class(family).from_pretrained(
            directory,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({} if labels is None else _named(labels)),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be read by transformers: {str(error).splitlines()[0]}") from error
    inner, report = loaded
    drawn = tuple(f"{name}." for name in CLASS_HEADS[found["model_type"]]) if own != family else ()
    if missing := [name for name in sorted(report["missing_keys"]) if not name.startswith(drawn)]:
        raise CheckpointError(f"{directory} lacks weights: {', '.join(missing[:3])}.")
    kinds = {one.family: one for one in (TransformersModel, MaskedModel, ClassifierModel)}
    model = kinds[family](inner)
    words = [number for number in range(model.vocab_size) if number != inner.config.pad_token_id]
    ids = torch.tensor([words[:4]])  # some encoders' positions do not count padding, whatever the mask says
    with torch.no_grad():
        theirs, ours = inner.eval()(ids).logits, model(ids)
    if not torch.allclose(theirs.view_as(ours), ours, rtol=1e-4, atol=1e-4):
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
