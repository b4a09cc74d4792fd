"""Compares served text with a plain torch loop over the checkpoint: tokenizer, greedy continuations, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from flows.serving.client import TRANSPORTS, Completion, Transport
from flows.serving.endpoint import Endpoint
from flows.serving.proof.scores_check import Check

FUZZ_STRINGS = 48
FUZZ_CHARACTERS = 24
"""Longest random string."""
EDGE_STRINGS = (
    "",
    " ",
    "\n\n\t",
    "\x00",
    "a\x00b\x07\x1b[0m\x7f\x85",
    "<|endoftext|>",
    "<|im_start|>user\nx<|im_end|>",
    "e\u0301 \u00e9",
    "e" + "\u0301" * 40,
    "\U0001f469\u200d\U0001f680",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd\U0001f1e9\U0001f1ea",
    "\ufeff\u202ea",
    "\u2066\u05d0\u05d1\u2069 \u0627\u0644\u200f1",
    "\ud7ff\ue000\uffff\U00010000\U0010ffff",
    "\u2028\u2029\u00a0\u3000\u200b",
    "\u1100\u1161\u11a8\uac01",
    "0" * 5000,
    "ab\u00e4\U0001f600 \n" * 800,
)
"""Controls, special tokens, combining and joined characters, right to left, beside surrogates, very long."""
UNICODE_RANGES = (
    (0x00, 0x20),
    (0x20, 0x7F),
    (0x80, 0x250),
    (0x300, 0x370),
    (0x370, 0x530),
    (0x590, 0x700),
    (0x1100, 0x1200),
    (0x2000, 0x2070),
    (0x3040, 0x9FFF),
    (0xD700, 0xD800),
    (0xE000, 0xFFFF),
    (0x10000, 0x10FFFF),
    (0x1F1E6, 0x1FAFF),
)


@dataclass(frozen=True)
class Served:
    """Where the text model answers."""

    endpoint: Endpoint
    model: str
    version: str

    def generate(self, transport: Transport, prompt: str, **options: float) -> Completion:
        """A continuation, over a connection of its own."""
        with self.endpoint.connect(transport) as client:
            return client.generate(self.model, prompt, version=self.version, options=options)


@dataclass(frozen=True)
class Checkpoint:
    """The trained model with its tokenizer, in plain torch."""

    model: nn.Module
    tokenizer: Tokenizer
    eos_token_id: int
    sequence_length: int

    def continue_greedily(self, prompt: str, max_tokens: int) -> tuple[list[int], list[float]]:
        """New token ids, and by how much each led the second best.

        A prompt that is too long keeps its last tokens, so that all new ones but the last fit behind it.
        """
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids or [self.eos_token_id]
        ids = ids[-max(1, self.sequence_length - max_tokens + 1) :]
        new: list[int] = []
        leads: list[float] = []
        with torch.no_grad():
            while len(new) < max_tokens and self.eos_token_id not in new:
                context = torch.tensor([ids + new])[:, -self.sequence_length :]
                best = self.model(context)[0, -1].topk(2)
                new.append(int(best.indices[0]))
                leads.append(float(best.values[0] - best.values[1]))
        return new, leads

    def best_log_probability(self, ids: Sequence[int]) -> float:
        """Of the likeliest token after these."""
        with torch.no_grad():
            return float(self.model(torch.tensor([ids]))[0, -1].log_softmax(-1).max())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of new tokens, the end of text left out."""
        return str(self.tokenizer.decode([one for one in ids if one != self.eos_token_id], skip_special_tokens=False))


def check_text(
    served: Served,
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    new_tokens: int,
    tolerance: float,
    random: np.random.Generator,
) -> list[Check]:
    """Rows on the tokenizer, on each prompt over each transport and all of them at once, and on seeds.

    Args:
        served: The text model.
        checkpoint: What it has to equal.
        prompts: Texts to continue.
        new_tokens: How far.
        tolerance: Two scores that are closer than this may change places.
        random: Makes the strings that the tokenizers are compared on.
    """
    checks = [_check_tokenizer(served, checkpoint, tolerance, random)]
    expected = [checkpoint.continue_greedily(prompt, new_tokens) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        for transport in TRANSPORTS:
            together = list(pool.map(lambda prompt: served.generate(transport, prompt, max_tokens=new_tokens), prompts))  # noqa: B023
            for number, (prompt, answer, (new, leads)) in enumerate(zip(prompts, together, expected, strict=True)):
                alone = served.generate(transport, prompt, max_tokens=new_tokens)
                for requests, completion in (("alone", alone), ("together", answer)):
                    details: dict[str, Any] = {"transport": transport.value, "prompt": number, "requests": requests}
                    failure = None
                    if not _equal(completion, checkpoint, new):
                        step, failure = _explain(served, transport, prompt, checkpoint, new, leads, tolerance)
                        details |= {"differs_at_token": step, "reason": failure or "near tie"}
                    checks.append(Check("greedy text", failure is None, tolerance=tolerance, details=details))
            checks.append(_check_stream(served, transport, prompts, new_tokens))
    checks.append(_check_seed(served, prompts[0], new_tokens))
    return checks


def _equal(completion: Completion, checkpoint: Checkpoint, new: Sequence[int]) -> bool:
    return completion.completion_tokens == len(new) and completion.text == checkpoint.decode(new)


def _explain(
    served: Served,
    transport: Transport,
    prompt: str,
    checkpoint: Checkpoint,
    new: Sequence[int],
    leads: Sequence[float],
    tolerance: float,
) -> tuple[int | None, str | None]:
    """The first token that differs, and why that is a failure; no reason if two scores were a near tie there."""
    for step in range(1, len(new) + 1):
        one_more = served.generate(transport, prompt, max_tokens=step)
        expected, _ = checkpoint.continue_greedily(prompt, step)
        if not _equal(one_more, checkpoint, expected):
            lead = leads[step - 1]
            if lead < tolerance:
                return step, None
            wanted = checkpoint.decode(expected)
            return step, f"token {step}: served {one_more.text!r}, expected {wanted!r}, which leads by {lead:.3g}"
    return None, "the tokens agree one by one, the whole text does not"


def _check_tokenizer(served: Served, checkpoint: Checkpoint, tolerance: float, random: np.random.Generator) -> Check:
    """Equal token counts, and an equal next token, which hangs on every id before it."""
    texts = [*EDGE_STRINGS, *(_random_string(random) for _ in range(FUZZ_STRINGS))]
    failures, near_ties = [], 0
    with served.endpoint.connect(Transport.grpc) as client:
        for text in texts:
            answer = client.generate(served.model, text, version=served.version, options={"max_tokens": 1})
            count = len(checkpoint.tokenizer.encode(text, add_special_tokens=False).ids)
            new, leads = checkpoint.continue_greedily(text, 1)
            if answer.prompt_tokens != count:
                failures.append(f"{text!r} has {answer.prompt_tokens} tokens, not {count}")
            elif not _equal(answer, checkpoint, new):
                if leads[0] < tolerance:
                    near_ties += 1
                else:
                    failures.append(f"{text!r} is followed by {answer.text!r}, not {checkpoint.decode(new)!r}")
    details: dict[str, Any] = {"strings": len(texts), "near_ties": near_ties} | (
        {"failure": failures[0]} if failures else {}
    )
    return Check("tokenizer", not failures, tolerance=tolerance, details=details)


def _random_string(random: np.random.Generator) -> str:
    ranges = random.integers(0, len(UNICODE_RANGES), random.integers(1, FUZZ_CHARACTERS + 1))
    return "".join(chr(int(random.integers(*UNICODE_RANGES[number]))) for number in ranges)


def _check_stream(served: Served, transport: Transport, prompts: Sequence[str], new_tokens: int) -> Check:
    """What comes piece by piece is what comes at once."""
    details: dict[str, Any] = {"transport": transport.value, "prompts": len(prompts)}
    for prompt in prompts:
        whole = served.generate(transport, prompt, max_tokens=new_tokens).text
        with served.endpoint.connect(transport) as client:
            options = {"max_tokens": new_tokens}
            pieces = list(client.stream(served.model, prompt, version=served.version, options=options))
        if (text := "".join(piece.text for piece in pieces)) != whole:
            details["failure"] = f"{prompt!r} is followed by {whole!r} at once and by {text!r} in pieces"
    return Check("streamed text", "failure" not in details, details=details)


def _check_seed(served: Served, prompt: str, new_tokens: int) -> Check:
    texts = {
        served.generate(transport, prompt, max_tokens=new_tokens, temperature=1.0, top_p=0.95, seed=7).text
        for transport in TRANSPORTS * 2
    }
    details: dict[str, Any] = {"seed": 7} | ({"failure": f"one seed, {len(texts)} texts"} if len(texts) > 1 else {})
    return Check("same seed, same sample", len(texts) == 1, details=details)
