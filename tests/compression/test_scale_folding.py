"""Folding scales changes nothing in floating point, and what it is for gets better."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flows.compression.int8 import sqnr_db
from flows.compression.layer_inputs import Inputs
from flows.compression.scale_folding import InputGroup, awq_scales, fold_, input_groups, output_error, smoothing_scales
from flows.config.model import ModelConfig
from flows.model.affine import Grid, fit_grid
from flows.model.decoder import Decoder
from kernels.quantize import dequantize, quantize_rows

CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
)
PLAIN = InputGroup("", ("",))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(x: Tensor) -> Inputs:
    inputs = Inputs.of_width(x.shape[-1], with_gram=True, device=x.device)
    inputs.add(x)
    return inputs


@pytest.mark.parametrize("architecture", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"tie_word_embeddings": False}])
def test_the_function_stays_the_same(architecture: dict[str, bool]) -> None:
    model = Decoder(replace(CONFIG, **architecture), 50).double().requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(
            normal(*parameter.shape, seed=number).double() / parameter.shape[-1] ** 0.5 + (parameter.dim() < 2)
        )
    ids = torch.arange(30).view(2, 15)
    before = model(ids)
    groups = [*input_groups(model, "model.layers.0"), *input_groups(model, "")]
    assert len(groups) == 4 + (not model.config.tie_word_embeddings)
    for number, group in enumerate(groups):
        weight = model.get_submodule(group.readers[0]).weight.clone()
        own = weight.shape[1] // group.repeats
        scales = (normal(own, seed=number).double() / 2).exp()
        scales = scales.view(-1, 1, group.head_dim).expand(-1, group.repeats, -1).flatten()
        fold_(model, group, scales)
        assert torch.equal(model.get_submodule(group.readers[0]).weight, weight * scales)
    # float64 sums of a few dozen terms of about one, through a dozen layers: 2^-53 x thousands
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-12 * float(before.abs().max()))


def test_smoothing_scales_are_the_papers() -> None:
    # figure 5 of arXiv:2211.10438: max|X| = (2, 16, 2, 9), max|W| = (2, 1, 2, 1), alpha = 0.5: s = (1, 4, 1, 3)
    x = torch.tensor([[1.0, -16.0, 2.0, 6.0], [-2.0, 8.0, -1.0, -9.0]])
    weight = torch.tensor([[2.0, 1.0, -2.0], [1.0, -1.0, -1.0], [2.0, -1.0, -2.0], [-1.0, -1.0, 1.0]]).t()
    assert torch.equal(smoothing_scales(seen(x), [weight], 0.5), torch.tensor([1.0, 4.0, 1.0, 3.0]))


def test_smoothing_saves_inputs_with_outliers_in_int8() -> None:
    x, weight = normal(200, 64), normal(48, 64, seed=2)
    x[:, 5] *= 100
    scales = smoothing_scales(seen(x), [weight], 0.5)

    def in_int8(x: Tensor, weight: Tensor) -> Tensor:
        return dequantize(*quantize_rows(x)) @ dequantize(*quantize_rows(weight)).t()

    exact = x @ weight.t()
    rest = exact - x[:, 5:6] * weight[:, 5]  # the outlier's own product is exact enough either way
    plain = sqnr_db(rest, rest + in_int8(x, weight) - exact)
    smoothed = sqnr_db(rest, rest + in_int8(x / scales, weight * scales) - exact)
    assert smoothed > plain + 10  # the step of inputs shrinks from 300 / 127 to about 30 / 127: up to 20 dB


def test_awq_saves_what_meets_large_inputs_in_4_bits_and_never_loses() -> None:
    weight = normal(48, 64, seed=2)
    x = normal(400, 64)

    def rounded(weight: Tensor) -> Tensor:
        grid = fit_grid(weight, 4, 32)
        return grid.restore(grid.codes(weight))

    def error(scales: Tensor, inputs: Inputs) -> float:
        assert inputs.gram is not None
        return output_error(rounded(weight * scales) / scales - weight, inputs.gram)

    for outliers, most in ((1.0, 1.0), (30.0, 0.5)):
        x[:, ::16] = normal(400, 4, seed=3) * outliers
        inputs = seen(x)
        scales = awq_scales(inputs, [weight], rounded, PLAIN)
        assert error(scales, inputs) <= most * error(torch.ones(64), inputs)
    assert scales[0] > 2 * scales[1]


def test_awq_cuts_off_large_weights_that_meet_small_inputs() -> None:
    """In each group one weight of 8 stretches the grid for 31 of about 1; its inputs are a hundredth of theirs."""
    x, weight = normal(400, 64), normal(48, 64, seed=2)
    weight[:, ::32], x[:, ::32] = 8.0, x[:, ::32] / 100
    gram = seen(x).gram
    assert gram is not None

    def error(grid: Grid) -> float:
        return output_error(grid.restore(grid.codes(weight)) - weight, gram)

    spanning, by_weights = fit_grid(weight, 4, 32), fit_grid(weight, 4, 32, search=True)
    clipped = fit_grid(weight, 4, 32, search=True, gram=gram)
    # steps of 0.6 x the spanning ones leave 0.36 x their squared errors, and what is cut off is hardly looked at
    assert error(clipped) < 0.5 * error(spanning)
    assert error(clipped) < 0.7 * error(by_weights)


def test_inputs_that_one_output_becomes_have_one_scale() -> None:
    group = InputGroup("", ("",), repeats=2, head_dim=4)
    x = normal(100, 16) * torch.arange(1, 17)
    weight = normal(8, 16, seed=2)
    scales = awq_scales(seen(x), [weight], lambda some: fit_grid(some, 4).restore(fit_grid(some, 4).codes(some)), group)
    heads = scales.view(2, 2, 4)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert len(set(heads[:, 0].flatten().tolist())) == 8
