"""The attention references are what torch computes for each document, and each sequence, alone."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.document_attention import document_attention, document_bounds
from kernels.paged_decode_attention import paged_decode_attention


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def test_bounds_of_documents() -> None:
    bounds = document_bounds(torch.tensor([[0, 0, 2, 3, 3], [7, 7, 7, 7, 7], [0, 1, 2, 3, 4]]))
    assert bounds.first.tolist() == [[0, 0, 2, 3, 3], [0] * 5, [0, 1, 2, 3, 4]]
    assert bounds.end.tolist() == [[2, 2, 3, 5, 5], [5] * 5, [1, 2, 3, 4, 5]]
    assert bounds.first.dtype == bounds.end.dtype == torch.int32
    assert document_bounds(torch.zeros(2, 0, dtype=torch.int64)).end.shape == (2, 0)


def test_each_document_is_attended_to_alone() -> None:
    q, k = normal(1, 6, 9, 8), normal(1, 2, 9, 8)
    y = document_attention(q, k, k + 1, document_bounds(torch.tensor([[0] * 4 + [1] * 5])))
    for part in (slice(0, 4), slice(4, 9)):
        alone = document_attention(q[:, :, part], k[:, :, part], k[:, :, part] + 1, None)
        torch.testing.assert_close(y[:, :, part], alone)


def test_a_cache_in_pages_is_a_cache() -> None:
    q, pages = normal(3, 6, 8), normal(5, 4, 2, 8)
    table, lengths = torch.tensor([[3, 1, -1], [4, 0, 2], [-1, -1, -1]]), torch.tensor([7, 12, 0])
    y = paged_decode_attention(q, pages, pages + 1, table, lengths)
    for sequence in (0, 1):
        k = pages[table[sequence].clamp(min=0)].flatten(0, 1)[: lengths[sequence]].transpose(0, 1)  # [G, T, K]
        alone = scaled_dot_product_attention(q[sequence, :, None], k, k + 1, enable_gqa=True)
        torch.testing.assert_close(y[sequence], alone[:, 0])
    assert not y[2].any()
