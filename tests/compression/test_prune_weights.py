"""Truth of unstructured pruning: exactly as many zeros as asked for, and those that matter least."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flows.compression.prune_weights import prune_weights_
from flows.config.model import ModelConfig
from flows.config.prune import PruneConfig, SparsityMethod
from flows.model.decoder import Decoder, initialize


def squares(model: Decoder, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(layer.in_features, dtype=torch.float64, generator=generator)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_every_matrix_has_exactly_the_share_of_zeros(model: Decoder, method: str, sparsity: float) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = prune_weights_(model, PruneConfig(sparsity=sparsity, method=SparsityMethod(method)), squares(model))
    assert len(report) == 2 * 7 + 2
    for row in report:
        weight = model.get_submodule(row.name).weight
        zeros = int((weight == 0).sum())
        assert row.sparsity == zeros / weight.numel()
        if row.skipped_reason:
            assert row.name in ("model.embed_tokens", "lm_head")
            assert zeros == 0
        elif method == "wanda":
            assert ((weight == 0).sum(1) == round(sparsity * weight.shape[1])).all()
        else:
            assert zeros == round(sparsity * weight.numel())
    assert all(torch.equal(p[p != 0], before[name][p != 0]) for name, p in model.named_parameters())


def test_magnitude_takes_the_smallest_of_each_matrix_and_global_of_all(model: Decoder) -> None:
    model.model.layers[0].mlp.up_proj.weight.mul_(0.01)  # all of it is smaller than the rest
    kept = {name: p.clone() for name, p in model.named_parameters()}
    names = [name.removesuffix(".weight") for name, p in kept.items() if p.dim() == 2 and "layers" in name]
    total = sum(kept[f"{name}.weight"].numel() for name in names)
    report = prune_weights_(model, PruneConfig(sparsity=0.4, method=SparsityMethod.magnitude_global), {})
    rows = {row.name: row.sparsity for row in report if row.skipped_reason is None}
    zeros = sum(int((model.get_submodule(name).weight == 0).sum()) for name in names)
    assert zeros == round(0.4 * total)
    assert rows["model.layers.0.mlp.up_proj"] > 0.99
    assert rows["model.layers.1.mlp.up_proj"] < 0.4
    everything = torch.cat([kept[f"{name}.weight"].abs().flatten() for name in names])
    gone = torch.cat([(model.get_submodule(name).weight == 0).flatten() for name in names])
    assert everything[gone].max() <= everything[~gone].min()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_two_of_each_four_are_zero(model: Decoder, method: str) -> None:
    config = PruneConfig(sparsity=0.5, method=SparsityMethod(method), pattern="2:4")
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    given = squares(model)
    prune_weights_(model, config, given)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            groups = layer.weight.view(layer.weight.shape[0], -1, 4)
            assert ((groups == 0).sum(-1) == 2).all()
    score = before.abs().double()
    if method == "wanda":
        score = score * given["model.layers.1.mlp.down_proj"].sqrt()
    gone = model.model.layers[1].mlp.down_proj.weight == 0
    grouped, zeros = score.view(-1, 4), gone.view(-1, 4)
    assert (grouped.masked_fill(~zeros, 0).amax(1) <= grouped.masked_fill(zeros, 9).amin(1)).all()


def test_a_matrix_whose_rows_do_not_divide_by_four_is_skipped_with_the_reason() -> None:
    config = ModelConfig(
        hidden_size=64, intermediate_size=90, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = Decoder(config, 30).requires_grad_(False)
    initialize(model, 0)
    report = prune_weights_(model, PruneConfig(sparsity=0.5, pattern="2:4"), {})
    reasons = {row.name: row.skipped_reason for row in report}
    assert reasons["model.layers.0.mlp.down_proj"] == "its 90 columns are no multiple of 4"
    assert reasons["model.layers.0.mlp.up_proj"] is None


def test_wanda_beats_magnitude_where_some_inputs_are_a_hundred_times_larger(model: Decoder) -> None:
    """Outlier activations (arXiv:2306.11695, section 3): small weights that read them carry most of the output."""
    layer = model.model.layers[0].mlp.up_proj
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, 64, generator=generator)
    x[:, ::8] *= 100.0
    layer.weight[:, ::8] *= 0.1
    truth = x @ layer.weight.T
    given = squares(model) | {"model.layers.0.mlp.up_proj": x.double().square().mean(0)}
    weight = layer.weight.clone()
    errors = {}
    for method in (SparsityMethod.magnitude, SparsityMethod.wanda):
        layer.weight.copy_(weight)
        prune_weights_(model, PruneConfig(sparsity=0.5, method=method), given)
        errors[method] = float((x @ layer.weight.T - truth).norm() / truth.norm())
    # Wanda keeps all outliers' weights (10 x the score of any other); their share of the output is sqrt(100 / 107)
    assert errors[SparsityMethod.wanda] < 0.25
    assert errors[SparsityMethod.magnitude] > 3 * errors[SparsityMethod.wanda]
