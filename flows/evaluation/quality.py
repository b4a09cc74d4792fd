"""How well a candidate predicts the test split, and how far it is from the base model there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from tqdm import tqdm

from flows.artifact import Artifact, write_json_atomically
from flows.compression.candidate import count_parameters, load_candidate
from flows.config.checks import require
from flows.config.compression import QualityConfig
from flows.config.model import Family, Kernels
from flows.data.macro_f1 import by_label, macro_f1
from flows.data.masking import view_of
from flows.data.mixture import open_split
from flows.data.packed import IGNORED, Sequences
from flows.evaluation.base_states import BaseScores, StatesFile
from flows.evaluation.sanity import find_faults
from flows.evaluation.words import WordMarks
from flows.model.decoder import Decoder
from flows.model.transformers_model import ClassifierModel, TransformersModel

SCORES_LIMIT = 2**25
"""Scores held at once; bounds memory to a few times 128 MiB at any vocabulary size."""
CHUNK_TOKENS = 256
"""Tokens whose two distributions are compared at once."""
PROMPTS, PROMPT_TOKENS = 4, 16
"""Beginnings of test sequences that a candidate must be able to go on from."""


@dataclass(frozen=True)
class Quality:
    """Averages over the tokens that were predicted: the next one each time, or for a masked model those hidden.

    Of a model that classifies a text's label stands for a token; what only tokens have is None.
    """

    loss: float
    """Cross-entropy, nats per token."""
    perplexity: float
    """exp(loss); of a masked model a pseudo-perplexity (arXiv:1910.14659), with several tokens hidden at once."""
    accuracy: float
    """Share of tokens that were the model's first choice."""
    macro_f1: float | None
    """Of labels: mean over them of the harmonic mean of precision and recall."""
    bits_per_byte: float | None
    """Loss in bits, per byte of the text that the predicted tokens stand for."""
    word_accuracy: float | None
    """Share of words all of whose tokens were the model's first choice, as LAMBADA counts (arXiv:1606.06031); a word is
    what stands between white space. None: the text has no words."""
    agreement: float
    """Share of tokens for which the model's first choice is the base model's."""
    divergence: float
    """KL(base || model), nats per token: what the model lacks of what the base model expects."""
    tokens: int
    """Tokens that were predicted; those that are not count neither in the loss nor in the bytes."""
    bytes: int | None
    words: int


def build(directory: Path, config: QualityConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes quality.json and, of the base model, what others are compared with; runs on a GPU where there is one.

    Args:
        directory: Where it goes.
        config: How much of the split is read.
        parents: `model`, `tokens`, `tokenizer`; unless `model` is the base model, `base`, which is, and `base_quality`.

    Returns:
        The fields of `Quality`, `parameters`, `tasks` (results of the harness), `by_label` (of a model that
        classifies), and `faults`, the sentences of `find_faults`.

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
    goes_on = model.family == Family.causal_lm
    marks = WordMarks.of(parents["tokenizer"].path, token_bytes) if goes_on else None
    labels = model.labels if isinstance(model, ClassifierModel) else []
    confusion = np.zeros((len(labels), len(labels)), np.int64) if labels else None
    base = _base_scores(parents, device)
    keeps = base is None and config.kept_for_others
    with StatesFile(directory) if keeps else nullcontext() as states:
        quality = measure_quality(model, base, shown, sequences, batch_size, token_bytes, marks, confusion, states)
    prompts = np.stack([shown.row(int(index)).input_ids_L[:PROMPT_TOKENS] for index in shown.first(PROMPTS)])
    faults = find_faults(model, torch.from_numpy(prompts).to(next(model.parameters()).device), goes_on)
    metrics = {
        **asdict(quality),
        "parameters": count_parameters(model),
        "tasks": _tasks(model, config, parents),
        "by_label": {} if confusion is None else by_label(confusion, labels),
        "faults": faults,
    }
    write_json_atomically(directory / "quality.json", metrics)
    return metrics


def _base_scores(parents: Mapping[str, Artifact], device: str) -> BaseScores | None:
    if "base" not in parents:
        return None
    head = load_candidate(parents["base"].path, Kernels.auto).lm_head.to(device)
    measured = parents["base_quality"]
    return BaseScores(measured.path, head, measured.metrics["tokens"])


def _tasks(model: nn.Module, config: QualityConfig, parents: Mapping[str, Artifact]) -> dict[str, float]:
    tasks = config.tasks
    if tasks.directory is None:
        return {}
    from flows.evaluation.harness import run_tasks  # an extra, which takes seconds to import

    return run_tasks(model, parents["tokenizer"].path, tasks.directory, tasks.max_examples, config.sequence_length)


@torch.no_grad()
def measure_quality(
    model: Decoder | TransformersModel,
    base: BaseScores | None,
    dataset: Sequences,
    sequences: int,
    batch_size: int,
    token_bytes: NDArray[Any],
    marks: WordMarks | None,
    confusion_CC: NDArray[np.int64] | None = None,
    states: StatesFile | None = None,
) -> Quality:
    """Quality over `dataset`; every token but the first of a sequence, or of a document told apart, is predicted once.

    Args:
        model: Ids [B, L] to scores [B, L, V].
        base: What it is compared with, measured before on the same sequences; None = the model is the base model.
        dataset: Sequences of L + 1 tokens.
        sequences: At most how many of them.
        batch_size: How many at once.
        token_bytes: UTF-8 bytes that each token stands for [V].
        marks: Which tokens begin a word; None = single tokens are predicted, not words.
        confusion_CC: Where it is counted which labels were taken for which others, if labels are predicted.
        states: Takes what other models will be compared with.
    """
    device = next(model.parameters()).device
    total = torch.zeros(4, dtype=torch.float64)
    words = np.zeros(2, np.int64)
    tokens = text_bytes = 0
    chosen = dataset.first(sequences)
    with tqdm(desc="evaluate", total=len(chosen), unit="sequence", disable=None) as progress:
        for start in range(0, len(chosen), batch_size):
            rows = [dataset.row(int(index)) for index in chosen[start : start + batch_size]]
            inputs, targets, documents = (np.stack(part) for part in zip(*rows, strict=True))
            masks = {"document_ids_BL": torch.from_numpy(documents).to(device)} if documents.any() else {}
            ids, expected = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
            places = (expected.flatten() != IGNORED).nonzero().squeeze(-1)
            scores = model(ids, **masks) if states is None else states.run(model, ids, masks, places)
            total += _sums(scores.flatten(0, 1), expected.flatten(), places, base, tokens)
            if marks is not None:
                words += marks.count(targets, (scores.argmax(-1) == expected).cpu().numpy())
            tokens += len(places)
            if confusion_CC is None:
                text_bytes += int(token_bytes[targets[targets != IGNORED]].sum(dtype=np.int64))
            else:
                np.add.at(confusion_CC, (targets[:, 0], scores.argmax(-1)[:, 0].cpu().numpy()), 1)
            progress.update(len(rows))
    assert tokens > 0, "no token was predicted"
    assert text_bytes > 0 or confusion_CC is not None, "the predicted tokens stand for no text"
    loss, accuracy, agreement, divergence = (total / tokens).tolist()
    return Quality(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # a diverged model's must still be a number
        accuracy=accuracy,
        macro_f1=None if confusion_CC is None else macro_f1(confusion_CC),
        bits_per_byte=loss * tokens / math.log(2) / text_bytes if text_bytes else None,
        word_accuracy=float(words[1] / words[0]) if words[0] else None,
        agreement=1.0 if base is None else agreement,
        divergence=0.0 if base is None else divergence,
        tokens=tokens,
        bytes=text_bytes or None,
        words=int(words[0]),
    )


def _sums(scores: Tensor, expected: Tensor, places: Tensor, base: BaseScores | None, measured: int) -> Tensor:
    """Over tokens to predict: loss, hits, agreement with the base model, and divergence from it, float64 [4].

    Args:
        scores: Of all tokens [B x L, V].
        expected: Tokens to predict [B x L].
        places: Where there are such.
        base: What is compared with; None = the last two sums are 0.
        measured: How many tokens the batches before have predicted.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(places), CHUNK_TOKENS):
        part = places[start : start + CHUNK_TOKENS]
        mine, wanted = scores[part].float(), expected[part]
        log_q, first = log_softmax(mine, -1), mine.argmax(-1)
        found = [-log_q.gather(-1, wanted[:, None]), first == wanted]
        if base is not None:
            theirs = base.of(measured + start, len(part)).float()
            log_p = log_softmax(theirs, -1)
            found += [first == theirs.argmax(-1), (log_p.exp() * (log_p - log_q)).sum(-1)]
        total[: len(found)] += torch.stack([one.double().sum() for one in found]).cpu()
    return total
