"""The AdamW and gradient norm kernels against float64: on CUDA, or interpreted on the CPU."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flows.training.adamw import AdamW
from kernels import reference
from kernels.adamw import adamw, gradient_squares
from kernels.dispatch import KernelError
from kernels.testing import assert_close_to_truth

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (33,), (7, 5), (), (8192 + 1024 + 3,), (0,)]
"""Empty, odd, more than a block and more than a chunk."""
CONSTANTS: dict[str, Any] = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass
class State:
    """What an update reads and writes."""

    weights: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    copies: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.exp_avgs, *self.exp_avg_sqs, *self.steps, *self.copies]

    def as_(self, dtype: torch.dtype) -> "State":
        def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensor.clone().to(dtype) for tensor in tensors]

        steps = [step.clone() for step in self.steps]
        return State(wide(self.weights), wide(self.exp_avgs), wide(self.exp_avg_sqs), steps, [])

    def update(self, gradients: list[Tensor], squares: Tensor | None = None, **others: Any) -> None:
        held = self.weights, gradients, self.exp_avgs, self.exp_avg_sqs, self.steps
        adamw(*held, squares=squares, **{**CONSTANTS, "copies": self.copies, "kernels": "triton", **others})


def normal(
    shapes: Sequence[tuple[int, ...]], device: str, seed: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def made(device: str, shapes: Sequence[tuple[int, ...]] = SHAPES, copy: torch.dtype | None = None) -> State:
    return State(
        normal(shapes, device, 0),
        [torch.zeros(shape, device=device) for shape in shapes],
        [torch.zeros(shape, device=device) for shape in shapes],
        [torch.zeros((), device=device) for _ in shapes],
        [torch.full(shape, torch.nan, device=device, dtype=copy) for shape in shapes] if copy else [],
    )


def check(kernel: State, plain: State, truth: State, gradients: Sequence[list[Tensor]]) -> None:
    """Weights sum a term of about the learning rate each update, moments one of a gradient's size."""
    sizes = [torch.stack([one.double().abs() for one in each]).amax(0) for each in zip(*gradients, strict=True)]
    moved = [weight.abs() + len(gradients) * CONSTANTS["learning_rate"] for weight in truth.weights]
    for name, magnitudes in (("weights", moved), ("exp_avgs", sizes), ("exp_avg_sqs", [size**2 for size in sizes])):
        parts = getattr(kernel, name), getattr(plain, name), getattr(truth, name), magnitudes
        for one in zip(*parts, strict=True):
            assert_close_to_truth(*one)
    assert [step.item() for step in kernel.steps] == [len(gradients)] * len(kernel.steps)
    for copy, weight in zip(kernel.copies, kernel.weights, strict=bool(kernel.copies)):
        assert torch.equal(copy, weight.to(copy.dtype))


@pytest.mark.parametrize(
    ("dtype", "copy", "max_norm", "loss_scale"),
    [
        (torch.float32, None, 0.3, 1.0),
        (torch.bfloat16, torch.bfloat16, 0.3, 1.0),
        (torch.float16, torch.float16, 0.5, 1024.0),
        (torch.bfloat16, None, 0.0, 4.0),
    ],
)
def test_several_updates(
    dtype: torch.dtype, copy: torch.dtype | None, max_norm: float, loss_scale: float, device: str
) -> None:
    kernel = made(device, copy=copy)
    plain, truth = kernel.as_(torch.float32), kernel.as_(torch.float64)
    updates = []
    for seed in range(1, 3):
        gradients = normal(SHAPES, device, seed, dtype)
        squares = gradient_squares(gradients, "triton")
        kernel.update(gradients, squares, max_norm=max_norm, loss_scale=loss_scale)
        exact = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        for state, wide in ((plain, torch.float32), (truth, torch.float64)):
            clipped = 1 / loss_scale
            if max_norm:
                clipped *= min(1.0, max_norm / (float(exact.sqrt()) / loss_scale + 1e-6))
            state.update([gradient.to(wide) * clipped for gradient in gradients], kernels="reference")
        updates.append([gradient.double() * clipped for gradient in gradients])
    check(kernel, plain, truth, updates)


def test_updates_without_a_norm_are_those_of_torchs_optimizer(device: str) -> None:
    weights = normal(SHAPES, device, 0)
    groups = [{"params": weights[:2], "weight_decay": 0.1, "lr": 1e-2}, {"params": weights[2:], "weight_decay": 0.0}]

    def optimized(dtype: torch.dtype, ours: bool) -> State:
        copied = [
            {**group, "params": [weight.clone().to(dtype).requires_grad_() for weight in group["params"]]}
            for group in groups
        ]
        if ours:
            optimizer: torch.optim.Optimizer = AdamW(copied, 2e-2, (0.9, 0.95), 1e-8, "triton")
        else:
            optimizer = torch.optim.AdamW(copied, 2e-2, (0.9, 0.95), 1e-8)
        parameters = [parameter for group in copied for parameter in group["params"]]
        for seed in range(1, 3):
            for parameter, gradient in zip(parameters, normal(SHAPES, device, seed), strict=True):
                parameter.grad = gradient.to(dtype)
            optimizer.step()
        state = [optimizer.state[parameter] for parameter in parameters]
        return State(
            [parameter.detach() for parameter in parameters],
            [one["exp_avg"] for one in state],
            [one["exp_avg_sq"] for one in state],
            [one["step"] for one in state],
            [],
        )

    gradients = [normal(SHAPES, device, seed) for seed in range(1, 3)]
    truth, plain = optimized(torch.float64, False), optimized(torch.float32, False)
    check(optimized(torch.float32, True), plain, truth, gradients)


def test_state_of_torchs_optimizer_is_taken_over_and_back(device: str) -> None:
    def optimizer_of(weights: list[Tensor], ours: bool) -> torch.optim.Optimizer:
        parameters = [weight.clone().requires_grad_() for weight in weights]
        if ours:
            return AdamW([{"params": parameters}], 1e-2, (0.9, 0.95), 1e-8, "triton")
        return torch.optim.AdamW(parameters, 1e-2, (0.9, 0.95), 1e-8, 0.0, fused=True)

    def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
        parameters = optimizer.param_groups[0]["params"]
        for parameter, gradient in zip(parameters, normal(SHAPES[:3], device, seed), strict=True):
            parameter.grad = gradient
        optimizer.step()

    for ours in (False, True):
        first = optimizer_of(normal(SHAPES[:3], device, 0), ours)
        step(first, 1)
        second = optimizer_of([parameter.detach() for parameter in first.param_groups[0]["params"]], not ours)
        second.load_state_dict(deepcopy(first.state_dict()))
        for optimizer in (first, second):
            step(optimizer, 2)
        for one, other in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
            assert first.state[one].keys() == second.state[other].keys() == {"step", "exp_avg", "exp_avg_sq"}
            # two ways to round one update of about the learning rate
            allowed = 4 * torch.finfo(torch.float32).eps * (one.abs() + 1e-2)
            assert ((one - other).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(dtype: torch.dtype, device: str) -> None:
    shapes = [(1030,), (6, 40), (3, 5)]

    def shifted(tensors: list[Tensor]) -> list[Tensor]:  # contiguous, but 16 bytes do not divide the address
        return [torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape) for tensor in tensors]

    def turned(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.t().contiguous().t() if tensor.dim() > 1 else tensor for tensor in tensors]

    kernel = made(device, shapes, dtype if dtype != torch.float32 else None)
    plain, truth = kernel.as_(torch.float32), kernel.as_(torch.float64)
    kernel.weights, kernel.exp_avgs = shifted(kernel.weights), shifted(kernel.exp_avgs)
    updates = []
    for seed, arrange in ((1, shifted), (2, turned)):
        gradients = normal(shapes, device, seed, dtype)
        kernel.update(arrange(gradients))
        for state in (plain, truth):
            state.update([gradient.to(state.weights[0].dtype) for gradient in gradients], kernels="reference")
        updates.append(gradients)
    kernel.update([gradients[0][:1].expand(1030), *gradients[1:]])  # what a sum hands down
    for state in (plain, truth):
        wide = [gradient.to(state.weights[0].dtype) for gradient in gradients]
        state.update([wide[0][:1].expand(1030), *wide[1:]], kernels="reference")
    check(kernel, plain, truth, [*updates, gradients])


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, torch.nan), (torch.float16, -torch.inf), (torch.bfloat16, torch.inf)]
)
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype, value: float, device: str) -> None:
    shapes = [(20,), (1030,)]
    state = made(device, shapes, torch.bfloat16)
    state.update(normal(shapes, device, 1))
    before = [tensor.clone() for tensor in state.tensors()]
    gradients = normal(shapes, device, 2, dtype)
    gradients[1][1029] = value
    squares = gradient_squares(gradients, "triton")
    assert not squares.isfinite()
    for max_norm in (0.0, 0.3):
        state.update(gradients, squares, max_norm=max_norm)
    assert all(torch.equal(one, other) for one, other in zip(before, state.tensors(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype, device: str) -> None:
    whole = normal([(70_001,)], device, 3, dtype)[0]  # more than a chunk
    for gradients in (normal(SHAPES, device, 2, dtype), [whole], [whole[5:], whole[3:9], whole[::2], whole[:0]]):
        truth = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        plain = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().double()
        squares = gradient_squares(gradients, "triton")
        assert_close_to_truth(squares, plain, truth)
        parts = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        # 16 roundings in float32 on the way to the squares, as there; the root halves what they come to
        norm = torch.linalg.vector_norm(torch.stack(parts)).item()
        assert squares.sqrt().item() == pytest.approx(norm, rel=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30, 1e-44])
def test_norm_of_what_has_no_squares_in_float32(size: float, device: str) -> None:
    gradient = size * torch.linspace(-1, 1, 5000, device=device)
    mixed = torch.cat((gradient, torch.ones(5000, device=device), torch.zeros(5000, device=device)))
    for one in (gradient, mixed):
        truth = one.double().square().sum()
        squares = gradient_squares([one], "triton")
        assert squares.item() == pytest.approx(truth.item(), rel=16 * torch.finfo(torch.float32).eps)
    assert torch.equal(gradient_squares([0 * gradient], "triton"), torch.zeros((), device=device).double())


def test_a_shard_and_its_pieces_get_the_same_bits(device: str) -> None:
    """Whatever ZeRO cuts: each element's update depends on itself and the norm alone."""
    whole, pieces = made(device, [(2500,)], torch.bfloat16), made(device, [(2500,)], torch.bfloat16)
    cuts = [1, 999, 1500]
    gradient = normal([(2500,)], device, 1)[0]
    squares = gradient_squares([gradient], "triton")

    def cut(tensors: list[Tensor]) -> list[Tensor]:
        return list(tensors[0].split(cuts))

    of_pieces = State(
        cut(pieces.weights), cut(pieces.exp_avgs), cut(pieces.exp_avg_sqs), 3 * pieces.steps, cut(pieces.copies)
    )
    of_pieces.steps = [step.clone() for step in of_pieces.steps]
    for _ in range(2):
        whole.update([gradient], squares, max_norm=0.3)
        of_pieces.update(cut([gradient]), squares, max_norm=0.3)
    for one, other in zip(whole.tensors(), pieces.tensors(), strict=True):
        assert one.dim() == 0 or torch.equal(one, other)


def test_many_small_tensors_in_one_launch(device: str) -> None:
    shapes = [(size,) for size in range(1, 21)]
    kernel = made(device, shapes)
    plain, truth = kernel.as_(torch.float32), kernel.as_(torch.float64)
    gradients = normal(shapes, device, 1)
    kernel.update(gradients)
    plain.update(gradients, kernels="reference")
    truth.update([gradient.double() for gradient in gradients], kernels="reference")
    check(kernel, plain, truth, [gradients])


def test_the_same_bits_on_every_run(device: str) -> None:
    gradients = normal(SHAPES, device, 1)
    norms = {gradient_squares(gradients, "triton").item() for _ in range(3)}
    assert len(norms) == 1


def test_registration(device: str) -> None:
    shapes = [(5,), (3, 4)]
    state, gradients = made(device, shapes, torch.bfloat16), normal(shapes, device, 1, torch.bfloat16)
    torch.library.opcheck(torch.ops.millrace.gradient_squares.default, (gradients,))
    for copies, squares in ((state.copies, gradient_squares(gradients, "triton")), ([], None)):
        held = state.weights, gradients, state.exp_avgs, state.exp_avg_sqs, state.steps, copies, squares
        torch.library.opcheck(torch.ops.millrace.adamw_.default, (*held, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.3, 1.0))


def test_compiled(device: str) -> None:
    shapes = [(5,), (3, 4)]
    eager, compiled = made(device, shapes), made(device, shapes)
    gradients = normal(shapes, device, 1)

    def update(state: State) -> None:
        state.update(gradients, gradient_squares(gradients, "triton"), max_norm=0.3)

    update(eager)
    torch.compile(update, backend="aot_eager", fullgraph=True)(compiled)
    assert all(torch.equal(one, other) for one, other in zip(eager.tensors(), compiled.tensors(), strict=True))


def test_autograd_sees_that_weights_have_changed(device: str) -> None:
    state = made(device, [(4,)])
    weight = state.weights[0].requires_grad_()
    loss = (weight * weight).sum()
    state.update([torch.ones(4, device=device)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_auto_runs_the_kernel_where_it_can(device: str) -> None:
    gradients = normal([(50,)], device, 1)
    assert torch.equal(gradient_squares(gradients), gradient_squares(gradients, "triton"))
    wide = [gradient.double() for gradient in gradients]
    assert torch.equal(gradient_squares(wide), reference.gradient_squares(wide))
    kernel, auto = made(device, [(50,)]), made(device, [(50,)])
    kernel.update(gradients)
    auto.update(gradients, kernels="auto")
    assert torch.equal(kernel.weights[0], auto.weights[0])


def test_what_cannot_be_is_refused(device: str) -> None:
    state, gradients = made(device, [(4,), (3, 5)]), normal([(4,), (3, 5)], device, 1)
    with pytest.raises(KernelError, match=r"kernels take .*, not torch\.float64"):
        gradient_squares([gradient.double() for gradient in gradients], "triton")
    with pytest.raises(KernelError, match=r"steps have to be float32, not torch\.float32 or torch\.float64"):
        state.as_(torch.float64).update(gradients, copies=())
    turned = [state.weights[0], state.weights[1].t().contiguous().t()]
    with pytest.raises(KernelError, match="weights and moments have to be contiguous"):
        State(turned, state.exp_avgs, state.exp_avg_sqs, state.steps, []).update(gradients)
    with pytest.raises(ValueError, match=r"gradients have shapes \[\[4\]\]; weights have \[\[4\], \[3, 5\]\]"):
        state.update(gradients[:1])
    with pytest.raises(ValueError, match=r"gradients have to be of one dtype, not of \['torch.bfloat16', 'torch"):
        state.update([gradients[0].bfloat16(), gradients[1]])
    with pytest.raises(ValueError, match="gradients have to be of one dtype, not of none"):
        gradient_squares([])
    with pytest.raises(KernelError, match=r"all tensors have to be on one device, not on .* and meta"):
        State(state.weights, state.exp_avgs, state.exp_avg_sqs, [step.to("meta") for step in state.steps], []).update(
            gradients
        )
    with pytest.raises(ValueError, match="copies have to be contiguous"):
        state.update(gradients, copies=turned)
    state.steps.pop()
    with pytest.raises(ValueError, match="there are 1 steps for 2 weights"):
        state.update(gradients)
    State([], [], [], [], []).update([])  # nothing to do
