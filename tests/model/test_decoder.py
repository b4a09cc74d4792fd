"""The decoder itself: padding, batches, no NaN, seeds, precision, compilation."""

from dataclasses import replace

import pytest
import torch

from flows.config.model import Kernels, ModelConfig
from flows.model.attention import allowed_keys
from flows.model.decoder import Decoder, initialize

VOCAB = 97
TINY = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)
NOISE = 64 * torch.finfo(torch.float32).eps
"""Relative noise of float32: sums of up to 48 terms in another order, over 3 layers (random-walk growth, with room)."""


def made(config: ModelConfig = TINY, seed: int = 0) -> Decoder:
    model = Decoder(config, VOCAB).eval()
    initialize(model, seed)
    with torch.no_grad():  # larger than initial weights, so that attention is far from uniform
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= NOISE * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "mask",
    [[0] * 5 + [1] * 9, [1] * 9 + [0] * 5, [0] * 2 + [1] * 9 + [0] * 3, [1] * 4 + [0] * 5 + [1] * 5],
    ids=["left", "right", "both", "within"],  # within: wrong unless positions count real tokens only
)
def test_padding_changes_nothing(mask: list[int]) -> None:
    model, tokens = made(), ids(1, 9)
    mask_BL = torch.tensor([mask])
    padded = ids(1, len(mask)).masked_scatter(mask_BL.bool(), tokens)
    assert_same(model(padded, mask_BL)[mask_BL.bool()], model(tokens)[0])


def test_a_query_looks_at_real_tokens_up_to_itself_and_at_itself() -> None:
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]])
    # padding, real, padding, real: each padded row has itself, so that no softmax is over nothing
    assert torch.equal(allowed_keys(torch.tensor([[0, 1, 0, 1]]))[0, 0].long(), expected)


@torch.no_grad()
def test_a_mask_of_ones_is_no_mask() -> None:
    model, tokens = made(), ids(3, 11)
    assert_same(model(tokens, torch.ones_like(tokens)), model(tokens))


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model, tokens = made(), ids(4, 10)
    mask = torch.ones_like(tokens)
    for row, length in enumerate((10, 7, 3, 1)):
        mask[row, length:] = 0
    together = model(tokens, mask)
    for row, length in enumerate((10, 7, 3, 1)):
        assert_same(together[row, :length], model(tokens[row : row + 1, :length])[0])


@torch.no_grad()
def test_scores_depend_on_no_later_token_and_on_every_earlier_one() -> None:
    model, tokens = made(), ids(1, 8)
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % VOCAB
    before, after = model(tokens)[0], model(changed)[0]
    assert_same(after[:4], before[:4])
    assert ((after[4:] - before[4:]).abs().amax(-1) > 100 * NOISE * before.abs().max()).all()


@torch.no_grad()
def test_order_of_tokens_matters() -> None:
    model = made()
    first, second = torch.tensor([[3, 7, 5]]), torch.tensor([[7, 3, 5]])
    assert (model(first)[0, -1] - model(second)[0, -1]).abs().max() > 100 * NOISE * model(first).abs().max()


def test_fully_padded_rows_give_numbers_and_gradients() -> None:
    model, tokens = made(), ids(2, 6)
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    logits = model(tokens, mask)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@torch.no_grad()
def test_forward_hidden_is_what_the_head_projects() -> None:
    model, tokens = made(), ids(2, 5)
    assert torch.equal(model.lm_head(model.forward_hidden(tokens)), model(tokens))


def test_initial_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = made(seed=3)
    torch.manual_seed(6)
    again, other = made(seed=3), made(seed=4)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_initial_weights_have_the_documented_spread() -> None:
    config = replace(TINY, hidden_size=256, intermediate_size=256, initializer_range=0.05)
    model = Decoder(config, VOCAB)
    initialize(model, 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            continue
        std = 0.05 / 6**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.05
        # the spread of n draws is off by std / sqrt(2 n) on average; six times that
        assert abs(parameter.std().item() - std) < 6 * std / (2 * parameter.numel()) ** 0.5


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = Decoder(TINY, VOCAB), Decoder(replace(TINY, tie_word_embeddings=False), VOCAB)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


@torch.no_grad()
def test_bf16_stays_near_float32() -> None:
    logits, exact = made().bfloat16()(ids(1, 4)), made()(ids(1, 4))
    assert logits.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: each of about 20 rounded operations in a row adds half a unit, in a random walk
    assert (logits.float() - exact).abs().max() < 20**0.5 * 2.0**-8 * 4 * exact.abs().max()


def test_compiled_gives_the_same_loss_and_gradients() -> None:
    tokens = ids(2, 9)
    grads = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)):
        model = made(replace(TINY, kernels=Kernels.auto))
        logits = wrap(model)(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for eager, compiled in zip(*grads, strict=True):
        assert_same(compiled, eager)


def test_a_document_depends_on_no_neighbour_neither_forward_nor_backward() -> None:
    """Three documents in a row against each alone: scores, loss and gradient of the embedding of its own tokens."""
    model, tokens = made(), ids(1, 12)
    documents_BL = torch.tensor([[0] * 3 + [1] * 5 + [2] * 4])
    packed = model(tokens, document_ids_BL=documents_BL)[0]
    for document in range(3):
        alone = tokens[:, documents_BL[0] == document]
        assert_same(packed[documents_BL[0] == document], model(alone)[0])
    gradients = []
    for neighbour in (tokens[0, :3], (tokens[0, :3] + 1) % VOCAB):
        model.zero_grad()
        row = torch.cat((neighbour, tokens[0, 3:]))[None]
        scores = model(row, document_ids_BL=documents_BL)
        torch.nn.functional.cross_entropy(scores[0, 3:7], tokens[0, 4:8]).backward()  # of the second document alone
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_documents_and_padding_go_together() -> None:
    model, tokens = made(), ids(1, 7)
    mask_BL = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0]])
    documents_BL = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    padded = ids(1, 10).masked_scatter(mask_BL.bool(), tokens)
    together = model(padded, mask_BL, documents_BL)[0]
    assert_same(together[2:5], model(tokens[:, :3])[0])
    assert_same(together[5:9], model(tokens[:, 3:])[0])
