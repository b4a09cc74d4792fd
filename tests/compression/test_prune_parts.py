"""Truth of structured pruning: the smaller decoder computes what the whole one does with the same parts silenced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flows.compression.importance import Importance
from flows.compression.prune_parts import Kept, choose_parts, keep_parts, norm_scales
from flows.config.model import ModelConfig
from flows.config.prune import PruneConfig, pruned_shape
from flows.model.decoder import Decoder

VOCAB = 50
SOURCE = ModelConfig(
    hidden_size=48, intermediate_size=20, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3
)
IDS = torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
NOISE = 1e-12
"""Of float64 sums of a few hundred terms of about one: 2^-53 x hundreds, a hundred times that."""


def decoder(config: ModelConfig) -> Decoder:
    """Weights of about one, in float64, norms and biases too."""
    model = Decoder(config, VOCAB).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + 0.3 * drawn if parameter.dim() == 1 else drawn / parameter.shape[-1] ** 0.5)
    model.model.embed_tokens.weight.mul_(config.hidden_size**0.5)
    return model


def everything(config: ModelConfig) -> Kept:
    layers = range(config.num_hidden_layers)
    return Kept(
        layers=list(layers),
        channels=list(range(config.hidden_size)),
        neurons=[list(range(config.intermediate_size)) for _ in layers],
        heads=[list(range(config.num_attention_heads)) for _ in layers],
        groups=[list(range(config.num_key_value_heads)) for _ in layers],
    )


def pruned(model: Decoder, kept: Kept, config: PruneConfig) -> Decoder:
    small = Decoder(pruned_shape(model.config, config, "base"), VOCAB).double().requires_grad_(False)
    small.load_state_dict(keep_parts(model.state_dict(), kept, model.config.head_dim))
    return small


def silence(model: Decoder, kept: Kept) -> None:
    """Has neurons, heads and layers that are not kept add nothing to the residual stream."""
    width = model.config.head_dim
    for number, layer in enumerate(model.model.layers):
        queries, neurons = torch.zeros(layer.self_attn.o_proj.in_features), torch.zeros(layer.mlp.down_proj.in_features)
        if number in kept.layers:
            place = kept.layers.index(number)
            neurons[kept.neurons[place]] = 1
            for head in kept.heads[place]:
                queries[head * width : (head + 1) * width] = 1
        layer.self_attn.o_proj.weight.mul_(queries)
        layer.mlp.down_proj.weight.mul_(neurons)


NARROW = {
    "neurons": (
        PruneConfig(intermediate_size=7),
        {"neurons": [[0, 1, 5, 6, 11, 18, 19], [*range(7)], [*range(13, 20)]]},
    ),
    "groups": (
        PruneConfig(num_key_value_heads=2),
        {"groups": [[0, 2], [1, 2], [0, 1]], "heads": [[0, 1, 4, 5], [2, 3, 4, 5], [0, 1, 2, 3]]},
    ),
    "heads": (PruneConfig(num_attention_heads=3), {"heads": [[0, 3, 4], [1, 2, 5], [0, 2, 4]]}),
    "heads of groups": (
        PruneConfig(num_attention_heads=2, num_key_value_heads=2),
        {"groups": [[0, 2], [1, 2], [0, 1]], "heads": [[1, 4], [2, 5], [0, 3]]},
    ),
    "layers": (PruneConfig(layers=(0, 2)), {"layers": [0, 2]}),
}


@pytest.mark.parametrize("architecture", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("part", NARROW)
def test_the_pruned_model_is_the_whole_one_with_parts_silenced(part: str, architecture: dict[str, bool]) -> None:
    model = decoder(replace(SOURCE, **architecture))
    config, chosen = NARROW[part]
    kept = replace(everything(model.config), **chosen)
    if part == "layers":
        kept = replace(kept, **{name: getattr(kept, name)[:2] for name in ("neurons", "heads", "groups")})
    small = pruned(model, kept, config)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    whole = model(IDS)
    silence(model, kept)
    assert (small(IDS) - model(IDS)).abs().max() < NOISE
    assert (small(IDS) - whole).abs().max() > 1e-3  # or the silenced parts did nothing anyway


@pytest.mark.parametrize("tied", [True, False])
def test_a_narrower_residual_stream_is_the_silenced_one_up_to_the_statistic_of_its_norms(tied: bool) -> None:
    """A mean over D' channels is D / D' of one over D where the others are zero: so are weights and epsilon."""
    model = decoder(replace(SOURCE, tie_word_embeddings=tied))
    kept = replace(everything(model.config), channels=[*range(3, 30), 40, 41, 47])
    small = pruned(model, kept, PruneConfig(hidden_size=30))
    assert small.config.head_dim == model.config.head_dim == 8
    alive = torch.zeros(48, dtype=torch.float64)
    alive[kept.channels] = 1
    model.model.embed_tokens.weight.mul_(alive)
    if not tied:
        model.lm_head.weight.mul_(alive)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(alive[:, None])
        layer.mlp.down_proj.weight.mul_(alive[:, None])
    masked = model(IDS)
    assert (small(IDS) - masked).abs().max() > 1e-3  # zeros alone are not the same model
    for norm in (module for name, module in model.named_modules() if name.endswith(("layernorm", "model.norm"))):
        norm.weight.mul_((30 / 48) ** 0.5)
        norm.eps *= 30 / 48
    assert (small(IDS) - model(IDS)).abs().max() < NOISE


def test_norms_are_scaled_by_how_much_larger_the_kept_channels_are() -> None:
    model = decoder(SOURCE)
    kept = replace(everything(SOURCE), channels=[*range(12)])
    x = torch.randn(4096, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[:, :12] *= 3  # sum of squares 12 x 9 + 36: mean 3 over all, 9 over the kept
    given = model.model.norm(x)
    importance = Importance(input_squares={"lm_head": given.square().mean(0)})
    for number in range(3):
        for reader in ("self_attn.q_proj", "mlp.gate_proj"):
            importance.input_squares[f"model.layers.{number}.{reader}"] = torch.ones(48, dtype=torch.float64)
    scale = norm_scales(importance, model.state_dict(), kept)["model.norm.weight"]
    assert scale == pytest.approx(3**0.5, rel=0.02)  # 4096 draws of 12 squares: 1 / sqrt(4096 x 12 / 2) = 0.6 % off
    small = keep_parts(model.state_dict(), kept, SOURCE.head_dim, {"model.norm.weight": scale})
    assert torch.equal(small["model.norm.weight"], model.model.norm.weight[:12] * scale)
    assert torch.equal(
        small["model.layers.0.input_layernorm.weight"], model.model.layers[0].input_layernorm.weight[:12]
    )


def test_the_best_parts_are_kept_each_layer_its_own_groups_with_their_query_heads() -> None:
    importance = Importance(
        neurons=[torch.tensor([3.0, 1, 2, 4]), torch.tensor([1.0, 1, 1, 1]), torch.tensor([0.0, 5, 0, 6])],
        heads=[
            torch.tensor([1.0, 1, 9, 0, 2, 3]),
            torch.tensor([0.0, 9, 1, 1, 4, 4]),
            torch.tensor([6.0, 5, 4, 3, 2, 1]),
        ],
        channels=torch.tensor([1.0, 7, 7, 0]),
        layers=torch.tensor([0.2, 0.1, 0.3]),
    )
    source = replace(SOURCE, intermediate_size=4)
    shape = replace(
        source,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_head_dim=8,
    )
    kept = choose_parts(importance, source, shape, ())
    assert kept == Kept(
        layers=[0, 2], channels=[1, 2], neurons=[[0, 3], [1, 3]], heads=[[2, 5], [0, 2]], groups=[[1, 2], [0, 1]]
    )
    assert choose_parts(importance, source, shape, (1, 2)).groups == [[0, 2], [0, 1]]
