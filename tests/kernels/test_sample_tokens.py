"""The sampling kernel against its reference, token for token: on CUDA, or interpreted on the CPU in blocks of 64."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.dispatch import INTERPRETED, KernelError
from kernels.sample_tokens import MAX_VOCABULARY, sample_tokens

SETTINGS = [  # temperature, top_k, top_p
    (0.0, 0, 1.0), (1.0, 0, 1.0), (0.5, 5, 1.0), (1.0, 0, 0.5),
    (2.0, 30, 0.9), (1.0, 1, 1.0), (1.0, 0, 0.0), (5.0, 200, 0.95),
]  # fmt: skip
VOCABULARIES = [150] if INTERPRETED else [1, 150, 4096, 131072]


class Requests(NamedTuple):
    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    step: Tensor


def made(vocabulary: int, settings: list[tuple[float, int, float]], device: str, dtype: torch.dtype) -> Requests:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(len(settings), vocabulary, generator=generator)
    temperature, top_k, top_p = (torch.tensor(each) for each in zip(*settings, strict=True))
    seed = torch.randint(-(2**63), 2**63 - 1, (len(settings),), generator=generator)
    tensors = (logits.to(dtype), temperature, top_k, top_p, seed, torch.arange(len(settings)))
    return Requests(*(tensor.to(device) for tensor in tensors))


def check(requests: Requests) -> Tensor:
    tokens = sample_tokens(*requests, "triton")
    assert torch.equal(tokens, sample_tokens(*requests, "reference"))
    return tokens


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_equals_the_reference(vocabulary: int, device: str) -> None:
    requests = made(vocabulary, SETTINGS, device, torch.float32)
    tokens = check(requests)
    assert torch.equal(tokens[[0, 5, 6]], requests.logits.argmax(1)[[0, 5, 6]])


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 64, 65, 1000])
def test_more_vocabularies(vocabulary: int, dtype: torch.dtype, device: str) -> None:
    check(made(vocabulary, SETTINGS * 4, device, dtype))


def test_ties_and_what_is_no_number(device: str) -> None:
    """Few values, so that thresholds fall into ties; both zeros, infinities, and scores that are not numbers."""
    settings = [(1.0, 3, 0.7), (0.7, 2, 1.0), (1.0, 1, 1.0)]
    requests = made(70, settings, device, torch.bfloat16)
    logits = requests.logits.div(3).round().clamp(-2, 1) * torch.tensor([[1.0], [1.0], [0.0]], device=device)
    logits[:, 5], logits[:, 69] = torch.nan, -torch.inf
    check(requests._replace(logits=logits.bfloat16()))
    bad = torch.tensor([[torch.nan] * 3, [-torch.inf] * 3, [1.0, torch.inf, torch.inf]], device=device)
    assert check(requests._replace(logits=bad)).tolist() == [0, 0, 1]


def test_a_request_gets_the_same_token_in_any_company(device: str) -> None:
    requests = made(70, [(1.0, 0, 0.9), (1.0, 0, 0.8)], device, torch.float32)
    both = sample_tokens(*requests, "triton")
    wide = torch.cat((requests.logits, torch.full_like(requests.logits, torch.inf)), dim=1).flip(0)[
        :, :70
    ]  # rows apart
    turned = Requests(wide, *(setting.flip(0) for setting in requests[1:]))
    assert torch.equal(sample_tokens(*turned, "triton"), both.flip(0))
    columns_apart = requests.logits.t().contiguous().t()
    alone = Requests(*(tensor[:1] for tensor in requests._replace(logits=columns_apart)))
    assert torch.equal(sample_tokens(*alone, "triton"), both[:1])


def test_no_requests(device: str) -> None:
    requests = Requests(*(tensor[:0] for tensor in made(8, SETTINGS, device, torch.float32)))
    assert sample_tokens(*requests, "triton").shape == (0,)


def test_registration(device: str) -> None:
    requests = made(8, [(1.0, 3, 0.5)], device, torch.float32)
    torch.library.opcheck(torch.ops.millrace.sample_tokens_fwd.default, tuple(requests))


@pytest.mark.exhaustive
def test_compiled(device: str) -> None:
    requests = made(8, [(1.0, 3, 0.5)], device, torch.float32)
    compiled: Any = torch.compile(sample_tokens, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*requests), sample_tokens(*requests, "triton"))


def test_what_cannot_be_is_refused(device: str) -> None:
    requests = made(8, SETTINGS[:2], device, torch.float32)
    with pytest.raises(KernelError, match=r"not torch\.float64"):
        sample_tokens(*requests._replace(logits=requests.logits.double()), "triton")
    with pytest.raises(ValueError, match=r"top_k has shape \[1\]; 2 requests need \[2\]"):
        sample_tokens(*requests._replace(top_k=requests.top_k[:1]))
    with pytest.raises(ValueError, match=rf"logits have 0 columns; there have to be 1 to {MAX_VOCABULARY}"):
        sample_tokens(*requests._replace(logits=requests.logits[:, :0]))
