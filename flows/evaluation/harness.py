"""Tasks of the language model evaluation harness (`lm_eval`) on a candidate, from files of this machine alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from flows.data.tokenizer import end_of_text_id, load_tokenizer
from flows.evaluation.task_files import read_tasks

ROWS = 8
"""Sequences computed at once."""
MAX_NEW_TOKENS = 256
"""Where a task of free text does not say."""


def run_tasks(
    model: nn.Module, tokenizer_dir: Path, tasks_dir: Path, max_examples: int | None, sequence_length: int
) -> dict[str, float]:
    """Results by task and measure, e.g. {"my_choice acc": 0.42}; standard errors are left out.

    Args:
        model: Ids [B, L] to scores [B, L, V].
        tokenizer_dir: Its tokenizer.
        tasks_dir: Task files.
        max_examples: Of each task; None = all.
        sequence_length: Longest context, in tokens; of longer ones the end is read.
    """
    tasks = read_tasks(tasks_dir)
    found = simple_evaluate(
        CandidateLM(model, tokenizer_dir, sequence_length),
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False),
        limit=max_examples,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        f"{task} {measure.removesuffix(',none')}": float(value)
        for task, measures in found["results"].items()
        for measure, value in measures.items()
        if isinstance(value, int | float) and measure.endswith(",none") and "_stderr" not in measure
    }


class CandidateLM(TemplateLM):  # type: ignore[misc]  # ships no types
    """A candidate as the harness wants it.

    Args:
        model: Ids [B, L] to scores [B, L, V].
        tokenizer_dir: Its tokenizer.
        max_length: Longest context, in tokens.
    """

    def __init__(self, model: nn.Module, tokenizer_dir: Path, max_length: int) -> None:
        super().__init__()
        self._model, self._max_length = model, max_length
        self._text: Tokenizer = load_tokenizer(tokenizer_dir)
        self._end = end_of_text_id(tokenizer_dir)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, which stands before a text without context."""
        return self._end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; nothing is ever added."""
        return list(self._text.encode(string, add_special_tokens=False).ids)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, nats; windows follow each other, each after the last token before it."""
        totals = []
        for request in requests:
            ids = [self._end, *self.tok_encode(request.args[0])]
            starts = range(0, len(ids) - 1, self._max_length)
            windows = [(ids[at : at + 1], ids[at + 1 : at + 1 + self._max_length]) for at in starts]
            totals.append(sum(likelihood for likelihood, _ in self._score(windows)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first of the task's stop texts."""
        return [self._continue(*request.args) for request in requests]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return list(self._score([(context, continuation) for _, context, continuation in requests]))

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, nats, and whether it is the greedy one."""
        for first in range(0, len(pairs), ROWS):
            some = pairs[first : first + ROWS]
            whole = [(context + continuation)[-self._max_length - 1 :] for context, continuation in some]
            ids = self._padded([tokens[:-1] for tokens in whole])
            scores = log_softmax(self._model(ids).float(), -1).cpu()
            for row, tokens, (_, continuation) in zip(scores, whole, some, strict=True):
                wanted = torch.tensor(tokens[-min(len(continuation), len(tokens) - 1) :])
                mine = row[len(tokens) - 1 - len(wanted) : len(tokens) - 1]
                likelihood = float(mine.gather(1, wanted[:, None]).double().sum())
                yield (likelihood if math.isfinite(likelihood) else -math.inf), bool((mine.argmax(-1) == wanted).all())

    def _padded(self, rows: Sequence[list[int]]) -> Tensor:
        """Ids [B, L]; what stands behind a row's end is seen by none of its tokens."""
        longest = max(map(len, rows))
        padded = [row + [self._end] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, device=next(self._model.parameters(), torch.zeros(0)).device)

    @torch.no_grad()
    def _continue(self, context: str, options: dict[str, Any]) -> str:
        ids = self.tok_encode(context) or [self._end]
        new: list[int] = []
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        for _ in range(int(options.get("max_gen_toks", MAX_NEW_TOKENS))):
            token = int(self._model(self._padded([(ids + new)[-self._max_length :]]))[0, -1].argmax())
            if token == self._end:
                break
            new.append(token)
            if any(stop in self._text.decode(new) for stop in stops):
                break
        text = str(self._text.decode(new))
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
