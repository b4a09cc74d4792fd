"""Texts that are generated together, in this process, on the exported program of a tiny model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.compression.candidate import load_candidate
from flows.config.serving import CacheDtype
from flows.data.tokenizer import load_tokenizer
from flows.export.coded_cache import keep_cache_in
from flows.export.generation import GENERATION, PAGE_TOKENS
from flows.export.runtime import PROGRAM
from flows.export.shipped import continuous_batching
from flows.export.shipped.continuous_batching import Generator, Text
from flows.export.shipped.given_text import Likelihoods, Pool
from flows.export.shipped.layers import Layers
from flows.export.shipped.sampling import Sampling
from flows.export.shipped.text_programs import PagedProgram, WholeProgram
from flows.serving.proof.text_check import Checkpoint
from tests.serving import tiny_model
from tests.serving.tiny_chain import Chain

TOKENS = 8
PROMPTS = ["def", "return self.value", "x" * 20, "class A:\n    def", "import", "def value", "number"]
PAGE_BYTES = 4 * 2 * 2 * PAGE_TOKENS * 2 * 8
"""Of the tiny model: float32, keys and values, two layers, two heads of width 8."""


@pytest.fixture(scope="module")
def checkpoint(chain: Chain) -> Checkpoint:
    model = load_candidate(chain.model.path).eval()
    return Checkpoint(model, load_tokenizer(chain.tokenizer.path), 0, tiny_model.SEQUENCE_LENGTH)


@pytest.fixture
def generator(chain: Chain, checkpoint: Checkpoint) -> Callable[..., Generator]:
    def make(pages: int = 64, max_running: int = 4, prefill_tokens: int = 6, whole: bool = False) -> Generator:
        program: Any = (
            WholeProgram(chain.program.path / PROGRAM, 1)
            if whole
            else PagedProgram(Layers(chain.generation.path / GENERATION, 1, pages * PAGE_BYTES))
        )
        assert whole or program.pool.num_pages == pages
        return Generator(program, checkpoint.decode, 0, max_running, prefill_tokens)

    return make


def text(checkpoint: Checkpoint, prompt: str, **changes: Any) -> Text:
    ids = checkpoint.tokenizer.encode(prompt).ids
    plain = {"max_tokens": TOKENS, "sampling": Sampling(), "random": np.random.default_rng(0)}
    return Text(ids=list(ids), prompt_tokens=len(ids), **(plain | changes))


def run(generator: Generator) -> list[list[Text]]:
    """The texts that grew in each step, until all have finished."""
    steps = []
    while not generator.is_idle:
        steps.append(generator.step())
        assert len(steps) < 1000
    return steps


@pytest.mark.parametrize("whole", [False, True], ids=["paged", "whole"])
def test_texts_together_are_those_of_the_checkpoint(
    checkpoint: Checkpoint, generator: Callable[..., Generator], whole: bool
) -> None:
    together = generator(whole=whole, prefill_tokens=100 if whole else 6)
    texts = [text(checkpoint, prompt) for prompt in PROMPTS]
    for one in texts:
        together.add(one)
    steps = run(together)
    for one, prompt in zip(texts, PROMPTS, strict=True):
        new, leads = checkpoint.continue_greedily(prompt, TOKENS)
        assert min(leads) > 1e-4, "a near tie proves nothing"
        assert one.new_ids == new
        assert one.finish_reason == ("stop" if new[-1] == 0 else "length")
    assert max(map(len, steps)) > 1
    assert len(steps) < sum(len(one.new_ids) for one in texts)
    assert together.cache_used_ratio == 0


@pytest.mark.parametrize("cache_dtype", [CacheDtype.int8, CacheDtype.fp8])
def test_texts_with_a_cache_in_8_bits_are_those_of_a_checkpoint_that_rounds_alike(
    chain: Chain, checkpoint: Checkpoint, tmp_path: Path, cache_dtype: CacheDtype
) -> None:
    directory = tiny_model.make_generation(tmp_path, chain.model.path, cache_dtype)
    program = PagedProgram(Layers(directory / GENERATION, 1, 24 * PAGE_BYTES))
    assert program.pool.num_pages == 64, "a token and head of width 8 takes 8 + 4 bytes instead of 32"
    model = load_candidate(chain.model.path)
    keep_cache_in(cache_dtype, model)
    rounding = replace(checkpoint, model=model)
    together = Generator(program, checkpoint.decode, 0, 4, 6)
    prompts = [*PROMPTS, PROMPTS[2]]  # the last reads the pages of the third
    texts = [text(checkpoint, prompt) for prompt in prompts]
    for one in texts:
        together.add(one)
    run(together)
    compared = 0
    for one, prompt in zip(texts, prompts, strict=True):
        new, leads = rounding.continue_greedily(prompt, TOKENS)
        sure = next((place for place, lead in enumerate(leads) if lead < 0.01), len(new))  # a near tie proves nothing
        assert one.new_ids[:sure] == new[:sure]
        compared += sure
    assert compared > 0.8 * TOKENS * len(prompts)


def test_texts_start_in_order_and_only_where_there_is_room(
    checkpoint: Checkpoint, generator: Callable[..., Generator]
) -> None:
    tight = generator(pages=4, max_running=3)  # a text takes one or two pages
    texts = [text(checkpoint, prompt) for prompt in PROMPTS]
    for one in texts:
        tight.add(one)
    first_seen: list[Text] = []
    for grown in run(tight):
        assert tight.running <= 3
        assert tight.cache_used_ratio <= 1
        first_seen += [one for one in grown if one not in first_seen]
    assert [texts.index(one) for one in first_seen] == list(range(len(texts)))
    assert all(one.finish_reason in ("stop", "length") for one in texts)


def test_a_beginning_is_computed_once(checkpoint: Checkpoint, generator: Callable[..., Generator]) -> None:
    prompt = "x" * (PAGE_TOKENS + 3)
    reusing = generator()
    first, second = (text(checkpoint, prompt) for _ in range(2))
    assert first.prompt_tokens > PAGE_TOKENS, "there is no whole page to share"
    reusing.add(first)
    run(reusing)
    reusing.add(second)
    reusing.step()
    assert len(second.new_ids) == 1, "the rest of the prompt fits one step, the whole would not"
    run(reusing)
    assert second.new_ids == first.new_ids


def test_a_long_prompt_does_not_hold_up_running_texts(
    checkpoint: Checkpoint, generator: Callable[..., Generator]
) -> None:
    fair = generator(prefill_tokens=2)
    running, long = text(checkpoint, "a"), text(checkpoint, "x" * 20)
    fair.add(running)
    fair.step()
    fair.add(long)
    while not long.new_ids:
        before = len(running.new_ids)
        fair.step()
        assert len(running.new_ids) == before + 1 or running.finish_reason


def test_a_seed_decides_whatever_else_runs(checkpoint: Checkpoint, generator: Callable[..., Generator]) -> None:
    def sample(others: int) -> list[int]:
        made = generator()
        one = text(checkpoint, "def", sampling=Sampling(temperature=1.5), random=np.random.default_rng(7))
        for _ in range(others):
            made.add(text(checkpoint, "class A", sampling=Sampling(temperature=1.5)))
        made.add(one)
        run(made)
        return one.new_ids

    assert sample(0) == sample(3)


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_who_is_not_waited_for_leaves_at_once(
    checkpoint: Checkpoint, generator: Callable[..., Generator], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "CANCELLED_LOOK_S", 0.0)
    over = {"is_cancelled": lambda: True} if reason == "cancelled" else {"deadline": time.monotonic()}
    made = generator(max_running=1)
    running, waiting = text(checkpoint, "def"), text(checkpoint, "class")
    for one in (running, waiting):
        made.add(one)
    made.step()
    for one in (running, waiting):
        vars(one).update(over)
    assert made.step() == [waiting, running]
    assert {running.finish_reason, waiting.finish_reason} == {reason}
    assert (made.is_idle, made.cache_used_ratio) == (True, 0)


def test_texts_are_asked_seldom_whether_they_are_cancelled(
    checkpoint: Checkpoint, generator: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batching, "CANCELLED_LOOK_S", 3600.0)
    asked = []

    def is_cancelled() -> bool:
        asked.append(time.monotonic())
        return False

    made, one = generator(), text(checkpoint, "def", max_tokens=4, is_cancelled=is_cancelled)
    made.add(one)
    run(made)
    assert (len(one.new_ids), len(asked)) == (4, 1)


def read_only(checkpoint: Checkpoint, prompt: str) -> Text:
    return text(checkpoint, prompt, max_tokens=0, prompt_likelihoods=Likelihoods(2), pool=Pool("mean"))


def test_texts_are_read_as_the_checkpoint_reads_them(
    checkpoint: Checkpoint, generator: Callable[..., Generator]
) -> None:
    """Alone and beside others that are read or continued, in parts; also where the pages are known already."""
    made = generator()
    texts = [read_only(checkpoint, prompt) for prompt in PROMPTS * 2]
    for one in texts:
        made.add(one)
        made.add(text(checkpoint, "def"))
    run(made)
    assert made.cache_used_ratio == 0
    for one in texts:
        ids = torch.tensor([one.ids])
        with torch.no_grad():
            hidden = checkpoint.model.forward_hidden(ids)[0].double()
            expected = torch.log_softmax(checkpoint.model(ids)[0].double(), -1)
        likelihoods, pool = one.prompt_likelihoods, one.pool
        assert likelihoods is not None
        assert pool is not None
        values = expected[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert likelihoods.log_probabilities == pytest.approx(values.tolist(), abs=1e-4)
        assert likelihoods.top_ids == expected[:-1].topk(2).indices.tolist()
        direction = hidden.sum(0) / hidden.sum(0).norm()
        assert pool.embedding() == pytest.approx(direction.numpy(), abs=1e-5)
        assert (one.finish_reason, one.new_ids, one.text) == ("length", [], "")


def test_texts_that_are_read_do_not_hold_up_running_ones(
    checkpoint: Checkpoint, generator: Callable[..., Generator]
) -> None:
    fair = generator(prefill_tokens=2)
    running = text(checkpoint, "a")
    fair.add(running)
    fair.step()
    for _ in range(6):
        fair.add(read_only(checkpoint, "x" * 20))
    while not running.finish_reason:
        before = len(running.new_ids)
        fair.step()
        assert len(running.new_ids) == before + 1
    assert not fair.is_idle
