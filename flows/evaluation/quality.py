"""Stage: how well a candidate predicts the test split: loss, perplexity, accuracy, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from flows.artifact import Artifact, write_json_atomically
from flows.compression.candidate import count_parameters, load_candidate
from flows.config.checks import require
from flows.config.compression import QualityConfig
from flows.config.model import Family, Kernels
from flows.data.masking import view_of
from flows.data.mixture import open_split
from flows.data.packed import IGNORED, Sequences
from flows.evaluation.sanity import find_faults

SCORES_LIMIT = 2**25
"""Scores held at once; bounds memory to a few times 128 MiB at any vocabulary size."""
PROMPTS, PROMPT_TOKENS = 4, 16
"""Beginnings of test sequences that a candidate must be able to go on from."""


@dataclass(frozen=True)
class Quality:
    """Averages over the tokens that were predicted: the next one each time, or for a masked model those hidden."""

    loss: float
    """Cross-entropy, nats per token."""
    perplexity: float
    """exp(loss); of a masked model a pseudo-perplexity (arXiv:1910.14659), with several tokens hidden at once."""
    accuracy: float
    """Share of tokens that were the model's first choice."""
    bits_per_byte: float
    """Loss in bits, per byte of the text that the predicted tokens stand for."""
    tokens: int
    """Tokens that were predicted; those that are not count neither in the loss nor in the bytes."""
    bytes: int


def build(directory: Path, config: QualityConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes quality.json; runs on a GPU where there is one.

    Args:
        directory: Where it goes.
        config: How much of the split is read.
        parents: `model`, `tokens`, `tokenizer`.

    Returns:
        The fields of `Quality`, `parameters`, and `faults`, the sentences of `find_faults`.

    Raises:
        ConfigError: `evaluate.max_tokens` is less than one sequence, or the test split is.
    """
    require(
        config.max_tokens >= config.sequence_length,
        "evaluate.max_tokens",
        config.max_tokens,
        f"must hold one sequence of data.sequence_length={config.sequence_length} tokens",
        "Set evaluate.max_tokens=131072.",
    )
    dataset = open_split(parents["tokens"].path, "test", config.sequence_length, config.document_masks, config.mixture)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_candidate(parents["model"].path, Kernels.auto).to(device)
    shown = view_of(model.family, parents["tokenizer"].path)(dataset)
    token_bytes = np.load(parents["tokenizer"].path / "token_bytes.npy")
    sequences = config.max_tokens // config.sequence_length
    batch_size = max(1, min(16, SCORES_LIMIT // (config.sequence_length * model.vocab_size)))
    quality = measure_quality(model, shown, sequences, batch_size, token_bytes)
    prompts = np.stack([shown.row(int(index)).input_ids_L[:PROMPT_TOKENS] for index in shown.first(PROMPTS)])
    goes_on = model.family == Family.causal_lm
    faults = find_faults(model, torch.from_numpy(prompts).to(next(model.parameters()).device), goes_on)
    metrics = {**asdict(quality), "parameters": count_parameters(model), "faults": faults}
    write_json_atomically(directory / "quality.json", metrics)
    return metrics


@torch.no_grad()
def measure_quality(
    model: nn.Module, dataset: Sequences, sequences: int, batch_size: int, token_bytes: NDArray[Any]
) -> Quality:
    """Quality over `dataset`; every token but the first of a sequence, or of a document told apart, is predicted once.

    Args:
        model: Ids [B, L] to scores [B, L, V].
        dataset: Sequences of L + 1 tokens.
        sequences: At most how many of them.
        batch_size: How many at once.
        token_bytes: UTF-8 bytes that each token stands for [V].
    """
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64)
    tokens = text_bytes = 0
    chosen = dataset.first(sequences)
    with tqdm(desc="evaluate", total=len(chosen), unit="sequence", disable=None) as progress:
        for start in range(0, len(chosen), batch_size):
            rows = [dataset.row(int(index)) for index in chosen[start : start + batch_size]]
            inputs, targets, documents = (np.stack(part) for part in zip(*rows, strict=True))
            masks = {"document_ids_BL": torch.from_numpy(documents).to(device)} if documents.any() else {}
            scores = model(torch.from_numpy(inputs).to(device), **masks)
            total += _loss_and_hits(scores, torch.from_numpy(targets).to(device))
            predicted = targets[targets != IGNORED]
            tokens += predicted.size
            text_bytes += int(token_bytes[predicted].sum(dtype=np.int64))
            progress.update(len(rows))
    assert tokens > 0, "no token was predicted"
    assert text_bytes > 0, "the predicted tokens stand for no text"
    loss, accuracy = (total / tokens).tolist()
    return Quality(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # a diverged model's must still be a number
        accuracy=accuracy,
        bits_per_byte=loss * tokens / math.log(2) / text_bytes,
        tokens=tokens,
        bytes=text_bytes,
    )


def _loss_and_hits(scores: Tensor, targets: Tensor) -> Tensor:
    flat, expected = scores.flatten(0, 1).float(), targets.flatten()
    loss = cross_entropy(flat, expected, ignore_index=IGNORED, reduction="none").double().sum()
    return torch.stack([loss, (flat.argmax(-1) == expected).double().sum()]).cpu()  # no token is `IGNORED`
