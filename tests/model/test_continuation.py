"""Text that a decoder writes with keys and values kept, against one that computes all of it again for each token."""

from __future__ import annotations

import pytest
import torch

from flows.config.distillation import GenerationConfig
from flows.config.model import ModelConfig
from flows.model.continuation import continue_rows, text_starts
from flows.model.decoder import Decoder, initialize
from kernels import reference

VOCAB_SIZE = 50


@pytest.fixture
def model() -> Decoder:
    config = ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    decoder = Decoder(config, VOCAB_SIZE)
    initialize(decoder, seed=1)
    return decoder.double()


def given(rows: int) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, (rows, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def written_anew(model: Decoder, row: torch.Tensor, config: GenerationConfig, seed: int) -> list[int]:
    """The row alone, with all of its tokens through the model for each new one."""
    tokens = row[None]
    for number in range(config.new_tokens):
        scores = model(tokens)[:, -1]
        knobs = (torch.tensor([value]) for value in (config.temperature, 0, 1.0, seed, number))
        tokens = torch.cat((tokens, reference.sample_tokens(scores, *knobs)[:, None]), 1)
    return tokens[0, len(row) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_are_written_as_each_would_be_alone_without_a_cache(model: Decoder, temperature: float) -> None:
    config = GenerationConfig(new_tokens=9, temperature=temperature)
    starts = torch.tensor([0, 3, 6, 0])
    seeds = torch.tensor([11, 12, 13, 14])
    written = continue_rows(model, given(4), starts, config, seeds)
    for row, start, seed, tokens in zip(given(4), starts.tolist(), seeds.tolist(), written.tolist(), strict=True):
        assert tokens == written_anew(model, row[start:], config, seed)
    assert written[0].tolist() != written[3].tolist()
    before = [layer.self_attn.attend for layer in model.model.layers]
    assert all(one.__name__ == "attend" for one in before)
    assert model.training


def test_a_seed_is_another_text(model: Decoder) -> None:
    config = GenerationConfig(new_tokens=12)
    row, starts = given(1).expand(3, -1), torch.zeros(3, dtype=torch.int64)
    same, again, other = continue_rows(model, row, starts, config, torch.tensor([5, 5, 6])).tolist()
    assert same == again != other


def test_texts_begin_behind_the_end_of_the_one_before() -> None:
    tokens = torch.tensor([[4, 0, 5, 6], [4, 5, 6, 7], [4, 5, 6, 0]])
    documents = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert text_starts(tokens, documents, 0).tolist() == [2, 0, 3]
    assert text_starts(tokens, None, 0).tolist() == [0, 0, 0]
