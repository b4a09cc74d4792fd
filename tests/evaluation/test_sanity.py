from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flows.config.model import ModelConfig
from flows.evaluation.sanity import NEW_TOKENS, find_faults
from flows.model.decoder import Decoder, initialize

PROMPTS = torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Decoder:
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = Decoder(config, vocab_size=40)
    initialize(model, seed=0)
    return model.requires_grad_(False).eval()


def test_a_model_fresh_from_the_draw_has_no_faults(model: Decoder) -> None:
    assert find_faults(model, PROMPTS) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_found(model: Decoder, value: float) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.lm_head.weight[7] = value
    assert find_faults(model, PROMPTS)[0].endswith("of its scores are not finite")


def test_a_model_that_ignores_its_input_is_found(model: Decoder) -> None:
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].expand(40, -1).clone())
    assert find_faults(model, PROMPTS)[0].startswith("its scores are the same for every input")
    model.model.norm.weight.zero_()
    assert find_faults(model, PROMPTS)[0].startswith("its scores are the same for every input")


def test_a_model_that_always_says_the_same_is_found(model: Decoder) -> None:
    class Stuck(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            scores = model(ids)
            scores[..., 5] += 1e3
            return scores

    expected = f"all {4 * NEW_TOKENS} tokens that were drawn from it are the same"
    assert find_faults(Stuck(), PROMPTS) == [expected]
    assert find_faults(Stuck(), PROMPTS, goes_on=False) == []  # nothing is drawn from a model that fills in


def test_a_model_that_only_repeats_what_it_is_given_has_no_faults() -> None:
    class Echo(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return 1e3 * nn.functional.one_hot(ids, 40).float()

    assert len(set(PROMPTS[:, -1].tolist())) > 1
    assert find_faults(Echo(), PROMPTS) == []


def test_a_model_that_breaks_on_its_own_words_is_found(model: Decoder) -> None:
    class Brittle(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return model(ids) * (1.0 if torch.equal(ids, PROMPTS) else float("nan"))

    assert find_faults(Brittle(), PROMPTS) == ["its scores are not finite after 1 generated tokens"]
