"""How 4-bit weights lie in memory, in plain torch.

Four codes share a 16-bit word, a quarter of a block of 128 columns apart: word j of a block holds code j in its lowest
bits, then codes j + 32, j + 64 and j + 96. A quarter lies within one group of 32, 64 or 128 columns. Masking a tile of
words thus gives tiles of whole columns, in 16 bits as the matrix unit wants them: a kernel unpacks in registers and
moves nothing between threads.

GPTQ (`qweight`, `qzeros`) and compressed-tensors (`weight_packed`, `weight_zero_point`) keep eight codes in an int32:
`pack(unpack_words(...))` converts them without a loss.
"""

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
"""Columns that share a scale."""
SYMMETRIC_ZERO = 8
"""Code that stands for zero where groups have no zero points of their own."""


BLOCK_COLUMNS = 128
"""Columns whose codes share words."""


def words_per_row(columns: int) -> int:
    """Words that `columns` codes take; a last block that is cut short is filled up."""
    return -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS // 4


def pack(codes: Tensor) -> Tensor:
    """Words of 4-bit codes; a last block that is cut short is filled up with code 0.

    Args:
        codes: Unsigned codes 0 to 15 [N, K].

    Returns:
        int16 [N, ceil(K / 128) * 32].
    """
    filled = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[1] % BLOCK_COLUMNS))
    quarters = torch.unflatten(filled, 1, (-1, 4, BLOCK_COLUMNS // 4)).unbind(2)
    words = torch.stack([quarter << 4 * place for place, quarter in enumerate(quarters)]).sum(0)
    return words.flatten(1).to(torch.int16)  # keeps the low 16 bits


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The codes that `pack` was given, uint8 [N, K].

    Args:
        packed: Words [N, ceil(K / 128) * 32].
        columns: K.
    """
    blocks = torch.unflatten(packed, 1, (-1, 1, BLOCK_COLUMNS // 4))
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=packed.device)[:, None]
    return (blocks >> shifts & 15).to(torch.uint8).flatten(1)[:, :columns]


def unpack_words(words: Tensor, dim: int) -> Tensor:
    """Codes of the layout that keeps eight neighbours in an int32, the first in its lowest bits.

    Args:
        words: int32. GPTQ packs weights [K, N] and compressed-tensors [N, K] along K; both pack zero points along N.
        dim: Which dimension is packed.

    Returns:
        uint8, eight times as long in `dim`.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> shifts & 15).to(torch.uint8).movedim(-1, dim + 1).flatten(dim, dim + 1)
