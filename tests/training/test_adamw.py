"""Without kernels, our AdamW is torch's fused one to the last bit."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from flows.training.adamw import AdamW
from flows.training.weight_average import keep_average
from kernels import reference

SHAPES = [(5, 7), (33,), ()]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def groups() -> list[dict[str, object]]:
    held = parameters()
    return [{"params": held[:1], "weight_decay": 0.1, "lr": 0.03}, {"params": held[1:], "weight_decay": 0.0}]


def step(optimizer: torch.optim.Optimizer, seed: int) -> list[Tensor]:
    """Updates all parameters but one at every second step; copies of all."""
    generator = torch.Generator().manual_seed(seed)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if seed % 2:
        held[1].grad = None
    optimizer.step()
    return [parameter.detach().clone() for parameter in held]


def test_every_bit_is_that_of_torchs() -> None:
    ours = AdamW(groups(), 1e-2, (0.9, 0.95), 1e-8, "auto")
    theirs = torch.optim.AdamW(groups(), 1e-2, (0.9, 0.95), 1e-8, fused=True)
    for seed in range(1, 5):
        for one, other in zip(step(ours, seed), step(theirs, seed), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    resumed = AdamW(groups(), 1e-2, (0.9, 0.95), 1e-8, "auto")
    for group, saved in zip(resumed.param_groups, theirs.param_groups, strict=True):
        for parameter, trained in zip(group["params"], saved["params"], strict=True):
            parameter.data.copy_(trained.data)
    resumed.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert all(torch.equal(*pair) for pair in zip(step(resumed, 5), step(theirs, 5), strict=True))


def test_an_average_of_the_weights_is_taken_once_an_update() -> None:
    optimizer = AdamW(groups(), 1e-2, (0.9, 0.95), 1e-8, "auto")
    keep_average(optimizer)
    for group in optimizer.param_groups:
        group["ema_decay"] = 0.5
    first, second = step(optimizer, 2), step(optimizer, 4)
    for state, one, other in zip(optimizer.state.values(), first, second, strict=True):
        assert torch.equal(state["ema"], one.lerp(other, 0.5))


def test_reference_clips_and_skips() -> None:
    """By float64 arithmetic written out."""
    weight, gradient = (torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    held = [weight.clone()], [gradient * 8], [torch.zeros_like(weight)], [torch.zeros_like(weight)], [torch.zeros(())]
    rules = {"learning_rate": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.2, "loss_scale": 8.0}
    copy_of = torch.zeros(6, dtype=torch.bfloat16)
    moment, square, expected = 0.0, 0.0, weight
    for number, max_norm in enumerate((0.5, 0.0, 1e9), start=1):
        squares = reference.gradient_squares([gradient * 8])
        reference.adamw(*held, squares=squares, max_norm=max_norm, copies=[copy_of], **rules)
        norm = gradient.square().sum().sqrt()
        clipped = gradient * min(1.0, max_norm / (norm.item() + 1e-6)) if max_norm else gradient
        moment, square = 0.9 * moment + 0.1 * clipped, 0.99 * square + 0.01 * clipped**2
        size = (moment / (1 - 0.9**number)) / ((square / (1 - 0.99**number)).sqrt() + 1e-8)
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * size
        torch.testing.assert_close(held[0][0], expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(copy_of, held[0][0].bfloat16())
        assert held[4][0] == number
    before = [tensor.clone() for tensors in held for tensor in tensors]
    held[1][0][3] = torch.nan
    reference.adamw(*held, squares=reference.gradient_squares(held[1]), max_norm=0.5, **rules)
    after = [tensor for tensors in held for tensor in tensors]
    assert all(torch.equal(*pair) for number, pair in enumerate(zip(before, after, strict=True)) if number != 1)
