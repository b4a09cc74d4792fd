# safetensors has few types:
# mypy: disable-error-code="no-untyped-call"
"""Decoders on disk as Hugging Face keeps them: config.json and model.safetensors, or shards with their index."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flows.artifact import flush_to_disk, write_json_atomically
from flows.config import ConfigError
from flows.config.model import Architecture, Kernels, ModelConfig
from flows.model.config_json import CONFIG, CheckpointError, hugging_face_config, read_config, read_json
from flows.model.decoder import Decoder
from flows.model.transformers_model import TransformersModel, check_kind, load_transformers_model
from flows.model.two_of_four import FORMAT, PLACES, VALUES, compressed_state, restore

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_RECOMPUTED = ".rotary_emb.inv_freq"
"""End of names that old checkpoints hold and that follow from config.json."""
_FREE_FIELDS = ("kernels", "initial_weights", "initializer_range")
"""Fields of the model's configuration that may differ from those of its initial weights."""


def save_decoder(
    directory: Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    vocab_size: int,
    max_position_embeddings: int,
    eos_token_id: int,
) -> None:
    """Writes a decoder so that `load_decoder` and transformers read it; each file appears whole, config.json last.

    One whose matrices have 2:4 zeros is written without them; transformers then refuses it.

    Args:
        directory: Where to; made if missing.
        state: Weights by Hugging Face name, all of one dtype; a tied `lm_head.weight` may be there or not.
        config: Shape of the decoder.
        vocab_size: Number of tokens.
        max_position_embeddings: Longest sequence in training, in tokens.
        eos_token_id: Token that ends a document.

    Raises:
        CheckpointError: A weight is missing, unknown, of another shape or dtype, or a tied head is not the embedding.
    """
    expected = _expected_shapes(config, vocab_size)
    state = dict(state)
    if config.tie_word_embeddings and _HEAD in state:
        head = state.pop(_HEAD)
        if _EMBEDDING in state and not torch.equal(head, state[_EMBEDDING]):
            raise CheckpointError(_untied("memory"))
    _check_names(expected, state.keys(), "memory")
    for name, tensor in state.items():
        _check_shape(name, tensor.shape, expected[name], "memory")
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1:
        raise CheckpointError(
            f"the weights in memory have several dtypes: {sorted(map(str, dtypes))}. Convert them to one."
        )
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".{WEIGHTS}.{os.getpid()}.tmp"
    written = compressed_state(state)
    save_file({name: tensor.detach().contiguous() for name, tensor in written.items()}, aside, {"format": "pt"})
    flush_to_disk(aside)
    aside.replace(directory / WEIGHTS)
    dtype = str(dtypes.pop()).removeprefix("torch.")
    described = hugging_face_config(config, vocab_size, max_position_embeddings, eos_token_id, dtype)
    if written.keys() != state.keys():
        described["quantization_config"] = {"quant_method": FORMAT}
    write_json_atomically(directory / CONFIG, described)


def load_decoder(directory: Path, kernels: Kernels = Kernels.reference) -> Decoder:
    """The decoder in a model directory, on the CPU, weights in float32 whatever the file's dtype.

    Args:
        directory: Hugging Face directory of a Llama-class model: ours, or any other.
        kernels: Which implementation of the fused operations it runs.

    Raises:
        CheckpointError: A file or weight is missing, unknown, damaged or of another shape.
    """
    if not is_floating_point(directory):
        raise CheckpointError(
            f"{directory / CONFIG} has a quantization_config: its weights are not floating point. "
            "Load the model that it was made from."
        )
    config, vocab_size = read_config(directory)
    with torch.device("meta"):
        model = Decoder(replace(config, kernels=kernels), vocab_size)
    model.to_empty(device="cpu")
    model.tie_weights()
    _copy_weights(model, directory)
    return model


def is_floating_point(directory: Path) -> bool:
    """Whether the weights of a model directory are numbers, not codes."""
    described = read_json(directory).get("quantization_config")
    return described is None or described.get("quant_method") == FORMAT


def check_initial_weights(config: ModelConfig, section: str = "model") -> None:
    """Checks that `initial_weights`, if any, fit the model; reads config.json only.

    Args:
        config: The model to be trained.
        section: Where it stands in the configuration, for messages: `model` or `distill.student`.

    Raises:
        ConfigError: They are missing, of another architecture, or of another shape.
    """
    if config.initial_weights is None:
        return
    with _as_config_error(config.initial_weights, section):
        if config.architecture == Architecture.transformers:
            check_kind(config.initial_weights, config.family)
            return
        found, _ = read_config(config.initial_weights)
    differing = [
        (name, value, getattr(found, name))
        for name, value in ((field.name, getattr(config, field.name)) for field in fields(ModelConfig))
        if name not in _FREE_FIELDS and _effective(config, name) != _effective(found, name)
    ]
    if differing:
        has = ", ".join(f"{name}={value}" for name, _, value in differing)
        settings = " ".join(f"{section}.{name}={'null' if value is None else value}" for name, _, value in differing)
        name, value, _ = differing[0]
        raise ConfigError(
            f"{section}.{name}={value} does not fit {section}.initial_weights={config.initial_weights}, "
            f"which have {has}. Set {settings}, or choose other initial weights."
        )


def _effective(config: ModelConfig, field: str) -> object:
    return config.head_dim if field == "attention_head_dim" else getattr(config, field)


def load_initial_model(
    config: ModelConfig, vocab_size: int, section: str = "model", labels: Sequence[str] | None = None
) -> Decoder | TransformersModel:
    """The model that `initial_weights` hold, to be trained.

    Args:
        config: The model, with `initial_weights`.
        vocab_size: Number of tokens.
        section: As in `check_initial_weights`.
        labels: Of the texts that it is to classify; see `load_transformers_model`.

    Raises:
        ConfigError: They are missing, damaged, of another shape or vocabulary, or know other labels.
    """
    assert config.initial_weights is not None
    if config.architecture == Architecture.decoder:
        model = Decoder(config, vocab_size)
        load_initial_weights(model, config.initial_weights, section)
        return model
    with _as_config_error(config.initial_weights, section):
        theirs = load_transformers_model(config.initial_weights, labels)
        _check_vocabulary(config.initial_weights, theirs.vocab_size, vocab_size, section)
    return theirs.train()


def load_initial_weights(model: Decoder, directory: Path, section: str = "model") -> None:
    """Copies the weights of a model directory into `model`, converted to its dtype.

    Args:
        model: Decoder of the same shape, its parameters whole (not yet partitioned over ranks).
        directory: Hugging Face directory of a Llama-class model.
        section: As in `check_initial_weights`.

    Raises:
        ConfigError: They are missing, damaged, or of another shape or vocabulary.
    """
    check_initial_weights(replace(model.config, initial_weights=directory), section)
    with _as_config_error(directory, section):
        _, vocab_size = read_config(directory)
        _check_vocabulary(directory, vocab_size, model.vocab_size, section)
        _copy_weights(model, directory)


def load_layers(model: Decoder, directory: Path, layers: Sequence[int]) -> None:
    """Copies some layers of a model directory into `model`, with embedding, final norm and output projection.

    Args:
        model: Decoder of the same shape, but for the number of its layers.
        directory: Hugging Face directory of a Llama-class model.
        layers: Which of its layers become the first, second, ... of `model`.

    Raises:
        CheckpointError: The directory's weights are missing or damaged.
    """
    places = {f"model.layers.{layer}.": f"model.layers.{place}." for place, layer in enumerate(layers)}
    state = {}
    for name, tensor in load_decoder(directory).state_dict().items():
        prefix = name[: name.find(".", len("model.layers.")) + 1] if name.startswith("model.layers.") else ""
        if not prefix or prefix in places:
            state[places.get(prefix, "") + name.removeprefix(prefix)] = tensor
    model.load_state_dict(state)


def _check_vocabulary(directory: Path, has: int, wanted: int, section: str) -> None:
    if has != wanted:
        raise ConfigError(
            f"{section}.initial_weights={directory} have vocab_size={has}, and this run's tokenizer {wanted}. "
            f"Set data.tokenizer.directory={directory}, or choose other initial weights."
        )


@contextmanager
def _as_config_error(directory: Path, section: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(f"{section}.initial_weights={directory} cannot be used: {error}") from error


@torch.no_grad()
def _copy_weights(model: Decoder, directory: Path) -> None:
    parameters = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    tied = model.config.tie_word_embeddings
    files = {name: path for name, path in _weight_files(directory).items() if not name.endswith(_RECOMPUTED)}
    packed = {name.removesuffix(VALUES) for name in files if name.endswith(VALUES)}
    files = {name.removesuffix(VALUES): path for name, path in files.items() if not name.endswith(PLACES)}
    head_path = files.pop(_HEAD, None) if tied else None
    _check_names(parameters.keys(), files.keys(), str(directory))
    for path in sorted(set(files.values())):
        with _open(path) as file:
            for name in (name for name, holder in files.items() if holder == path):
                parts = (name + VALUES, name + PLACES) if name in packed else (name,)
                tensor, *places = map(file.get_tensor, parts)
                tensor = restore(tensor, *places) if places else tensor
                _check_shape(name, tensor.shape, parameters[name].shape, str(path))
                parameters[name].copy_(tensor)
    if head_path is not None:
        with _open(head_path) as file:
            if not torch.equal(file.get_tensor(_HEAD).to(parameters[_EMBEDDING].dtype), parameters[_EMBEDDING]):
                raise CheckpointError(_untied(str(head_path)))


def _weight_files(directory: Path) -> dict[str, Path]:
    """Which file of the directory holds which tensor."""
    index = directory / INDEX
    if not index.exists():
        with _open(directory / WEIGHTS) as file:
            return {name: directory / WEIGHTS for name in file.keys()}  # noqa: SIM118  no mapping, whatever it looks like
    try:
        return {name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights: {error!r}. Copy the model again.") from error


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Name a directory with weights in safetensors format.") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy the model again.") from error


def _expected_shapes(config: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Decoder(config, vocab_size).named_parameters()}


def _check_names(expected: Collection[str], found: Collection[str], where: str) -> None:
    for problem, names in (("lack", set(expected) - set(found)), ("have", set(found) - set(expected))):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(
                f"the weights in {where} {problem} {len(names)} tensors that a decoder of this shape "
                f"{'has' if problem == 'lack' else 'lacks'}: {listed}. Bring config.json and weights together again."
            )


def _check_shape(name: str, found: Sequence[int], expected: Sequence[int], where: str) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{name} has shape {list(found)} in {where}, not {list(expected)} as config.json says. "
            "Bring config.json and weights together again."
        )


def _untied(where: str) -> str:
    return f"tie_word_embeddings=True, but in {where} {_HEAD} differs from {_EMBEDDING}. Set tie_word_embeddings=False."
